"""The copying probe, on models that copy by construction and on one that cannot."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from cpt.eval.copying import ROWS, CopyTask, copy_tasks, probe


class Induction(torch.nn.Module):
    """Predicts what followed the newest earlier occurrence of the last ``context`` tokens; nothing else."""

    def __init__(self, vocab_size: int, *, context: int = 1, reach: int = 10**6, positions: int = 1024) -> None:
        super().__init__()
        self.config = PretrainedConfig(bos_token_id=1, eos_token_id=2)
        self.config.max_position_embeddings = positions
        self.vocab_size, self.context, self.reach = vocab_size, context, reach
        self.calls = 0

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.calls += 1
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(self.context, len(ids)):
                wanted = ids[end - self.context + 1 : end + 1]
                for start in range(end - 1, max(self.context - 2, end - self.reach - 1), -1):
                    if ids[start - self.context + 1 : start + 1] == wanted:
                        logits[row, end, ids[start + 1]] = 1.0
                        break
        return SimpleNamespace(logits=logits)


def config(**change: Any) -> Any:
    return SimpleNamespace(**{"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512} | change)


def by_name(tasks: list[CopyTask]) -> dict[str, CopyTask]:
    return {task.name: task for task in tasks}


def test_a_model_that_looks_back_copies_everything() -> None:
    found = probe(Induction(600, positions=90), 600, seed=3, device="cpu")
    assert (found.exact_match, found.token_accuracy) == (1.0, 1.0)
    assert (found.exact_match_stderr, found.token_accuracy_stderr) == (0.0, 0.0)
    assert found.passages == 2 * ROWS and found.passage_tokens == 16
    assert {name: part.value for name, part in found.parts.items()} == {
        "passage 16 back": 1.0,
        "pairs 16 back": 1.0,
        "passage 64 back": 1.0,
        "pairs 64 back": 1.0,
    }


def test_a_model_that_sees_only_its_neighbourhood_loses_the_far_copies() -> None:
    found = probe(Induction(600, reach=20, positions=90), 600, seed=3, device="cpu")
    assert found.parts["passage 16 back"].value == 1.0
    far = found.parts["passage 64 back"].value
    assert far is not None and far < 0.05
    assert found.exact_match == 0.5
    assert found.exact_match_stderr == pytest.approx(np.std([0.0, 1.0] * ROWS, ddof=1) / (2 * ROWS) ** 0.5)


def test_an_untrained_model_copies_nothing_and_the_probe_is_the_same_twice() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = AutoConfig.for_model("llama", vocab_size=200, max_position_embeddings=64, **sizes)
    model: Any = AutoModelForCausalLM.from_config(made).train()
    once, again, other = (probe(model, 200, seed=seed, device="cpu") for seed in (1, 1, 2))
    assert once == again and once.parts != other.parts
    assert once.exact_match == 0.0 and once.token_accuracy is not None and once.token_accuracy < 0.2
    assert model.training
    half = probe(model.to(torch.bfloat16), 200, seed=1, device="cpu")
    assert half.token_accuracy is not None


def test_items_are_the_models_own_ordinary_tokens_and_repeat_what_they_say() -> None:
    tasks = by_name(copy_tasks(config(eos_token_id=[2, 9], pad_token_id=0), 500, seed=5))
    assert list(tasks) == [f"{kind} {distance} back" for distance in (16, 64, 256) for kind in ("passage", "pairs")]
    for task in tasks.values():
        assert task.rows.shape[0] == ROWS and (task.rows[:, 0] == 1).all()
        assert not np.isin(task.rows[:, 1:], [0, 1, 2, 9]).any() and task.rows.max() < 500
    passage, pairs = tasks["passage 64 back"], tasks["pairs 64 back"]
    assert passage.scored.tolist() == list(range(67, 81))
    assert (passage.rows[:, passage.scored] == passage.rows[:, passage.scored - 64]).all()
    for row in pairs.rows:
        listed = {tuple(pair) for pair in row[1:65].reshape(-1, 2).tolist()}
        again = [tuple(pair) for pair in row[65:].reshape(-1, 2).tolist()]
        assert len(listed) == 32 and len(set(again)) == 8 and set(again) <= listed
    assert pairs.scored.tolist() == list(range(66, 82, 2))


@pytest.mark.parametrize(
    ("positions", "distances", "length"), [(64, [16], 16), (20, [8], 8), (2048, [16, 64, 256], 16)]
)
def test_only_distances_that_the_context_has_room_for_are_asked(
    positions: int, distances: list[int], length: int
) -> None:
    tasks = copy_tasks(config(max_position_embeddings=positions), 500, seed=5)
    assert [task.distance for task in tasks if task.kind == "passage"] == distances
    assert all(task.rows.shape[1] == 1 + task.distance + length <= positions for task in tasks)


def test_a_model_without_learned_positions_or_bos_is_asked_everything() -> None:
    tasks = copy_tasks(config(max_position_embeddings=None, bos_token_id=None), 40, seed=5)
    assert [task.rows.shape[1] for task in tasks if task.kind == "passage"] == [32, 80, 272]
    assert tasks[0].scored[0] == 18


def test_logits_that_are_not_finite_make_the_values_unknown() -> None:
    class Broken(Induction):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            found = super().forward(input_ids, use_cache)
            if self.calls == 1:
                found.logits[0, -2, 5] = torch.nan
            return found

    found = probe(Broken(100, positions=33), 100, seed=3, device="cpu")
    assert found.exact_match is None and found.token_accuracy is None and found.exact_match_stderr is None
    assert found.parts["passage 16 back"].value is None and found.parts["pairs 16 back"].value == 1.0
