"""Questions answered in packed rows, on one rank and on two, against one forward pass per question."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.data.place import Place
from cpt.eval.scored_rows import Question, question
from cpt.eval.scoring import Answer, AskingError, Scorer, ScoringSpec, StoppedError
from cpt.model.kernels import prepare_model
from cpt.model.ulysses import share_rows
from cpt.train.loss_head import attach_loss_head

VOCAB = 97


def build(family: str = "llama", **more: Any) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    prepare_model(model, "sdpa")
    return model


def questions(number: int = 23, longest: int = 40) -> list[Question]:
    draw = torch.Generator().manual_seed(number)

    def tokens(length: int) -> list[int]:
        return torch.randint(1, VOCAB, (length,), generator=draw).tolist()

    def length(limit: int) -> int:
        return int(torch.randint(1, limit, (1,), generator=draw))

    asked = [question(tokens(length(longest)), tokens(length(5)), 64) for _ in range(number)]
    prompt = tokens(6)
    return asked + [question(prompt, [letter], 64) for letter in (3, 4, 5, 6)]


def scorer(model: torch.nn.Module, place: Place | None = None, **more: Any) -> Scorer:
    should_stop = more.pop("should_stop", lambda: False)
    spec = {"seq_len": 32, "micro_batch_size": 2, "backend": "sdpa", "device": torch.device("cpu")}
    return Scorer(model, ScoringSpec(**{**spec, **more}, place=place or Place()), should_stop=should_stop)


def ask(model: torch.nn.Module, asked: Sequence[Question], **more: Any) -> list[Answer]:
    own = scorer(model, **more)
    found = own.lead(lambda: own.answer(asked))
    assert found is not None
    return found


@torch.no_grad()
def one_by_one(model: Any, asked: Sequence[Question]) -> list[Answer]:
    found = []
    for each in asked:
        log_p = model(input_ids=torch.tensor([each.read])).logits[0, -len(each.wanted) :].log_softmax(-1)
        wanted = torch.tensor(each.wanted)
        own = log_p.gather(1, wanted[:, None])[:, 0]
        found.append(Answer(tuple(own.tolist()), tuple((log_p.argmax(-1) == wanted).tolist())))
    return found


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    assert [each.likeliest for each in found] == [each.likeliest for each in expected]
    for own, other in zip(found, expected, strict=True):
        assert own.log_ps == pytest.approx(other.log_ps, abs=1e-5)
        assert own.log_p == pytest.approx(sum(other.log_ps), abs=1e-4)


CHANGED = ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 5.0, "tie_word_embeddings": True})


@pytest.mark.parametrize(("family", "more"), [("llama", {}), CHANGED])
def test_answers_are_those_of_one_pass_per_question_with_and_without_a_loss_head(
    family: str, more: dict[str, Any]
) -> None:
    model = build(family, **more)
    attach_loss_head(model, "sdpa", vocab_size=VOCAB, device="cpu")
    asked = questions()
    assert_same(ask(model, asked), one_by_one(model.eval(), asked))


def test_greedy_answers_are_found() -> None:
    model = build().eval()
    prompt = (5, 6, 7)
    best = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    found = ask(model, [question(prompt, [best], 64), question(prompt, [(best + 1) % VOCAB], 64)])
    assert [each.is_greedy for each in found] == [True, False]


@pytest.mark.parametrize("change", [{"seq_len": 8}, {"seq_len": 300}, {"micro_batch_size": 1}, {"micro_batch_size": 7}])
def test_the_shape_of_the_passes_changes_nothing(change: dict[str, int]) -> None:
    model, asked = build(), questions()
    assert_same(ask(model, asked, **change), ask(model, asked))


def test_the_mode_of_the_model_is_put_back_and_no_gradient_is_left() -> None:
    model = build().train()
    modes: list[bool] = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    ask(model, questions())
    assert modes and not any(modes) and model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_nothing_asked_is_answered_without_a_pass() -> None:
    model = build()
    model.register_forward_hook(lambda *_: pytest.fail("a pass"))
    assert ask(model, []) == []


def test_a_stop_ends_the_passes_and_the_work() -> None:
    asked = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    model = build().train()
    with pytest.raises(StoppedError):
        ask(model, questions(60), should_stop=should_stop)
    assert len(asked) == 3 and model.training


def test_work_that_fails_says_what_it_was() -> None:
    own = scorer(build())
    with pytest.raises(AskingError, match="KeyError: 'gold'") as raised:
        own.lead(lambda: {}["gold"])
    assert isinstance(raised.value.__cause__, KeyError)


def on_two_ranks(rank: int, folder: str, sequence_parallel: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    place, calls = Place(rank, 2, sequence_parallel), []
    model = build()
    attach_loss_head(model, "sdpa", vocab_size=VOCAB, device="cpu")
    share_rows(model, "sdpa", place, vocab_size=VOCAB, device=torch.device("cpu"))
    model.register_forward_hook(lambda *_: calls.append(1))
    own = scorer(model, place)
    asked = questions() if rank == 0 else []  # the others are told
    found = own.lead(lambda: [*own.answer(asked[:20]), *own.answer(asked[20:])])
    told: dict[str, Any] = {"passes": len(calls), "failed": "", "stopped": False}
    told["answers"] = None if found is None else [[each.log_ps, each.likeliest] for each in found]

    def work_that_fails() -> None:
        own.answer(asked[:3])
        raise ValueError("no such metric")

    try:
        own.lead(work_that_fails)
    except AskingError as error:
        told["failed"] = str(error)

    def one_of_us() -> bool:
        flag = torch.tensor(float(rank == 1))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    stopping = scorer(model, place, should_stop=one_of_us)
    try:
        stopping.lead(lambda: stopping.answer(asked))
    except StoppedError:
        told["stopped"] = True
    Path(folder, f"told{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_two_ranks_answer_as_one_in_equally_many_passes_fail_together_and_stop_together(
    tmp_path: Path, sequence_parallel: int
) -> None:
    spawn: Callable[..., Any] = mp.spawn
    spawn(on_two_ranks, args=(str(tmp_path), sequence_parallel), nprocs=2)
    first, second = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1))
    alone = ask(build(), questions())
    assert_same([Answer(*map(tuple, each)) for each in first["answers"]], alone)
    assert second["answers"] is None
    assert first["passes"] == second["passes"] > 2
    assert "ValueError: no such metric" in first["failed"] and first["failed"] == second["failed"]
    assert first["stopped"] and second["stopped"]
