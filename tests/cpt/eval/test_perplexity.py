"""Held-out evaluation against an independent computation, on one process and on two."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.eval.document_pieces import Pieces, by_document
from cpt.eval.perplexity import EvalSpec, Evaluated, HeldOut, _extent, _lay_out, evaluate
from cpt.eval.records import EvalRecord, read_eval, write_eval
from cpt.model.kernels import prepare_model
from cpt.rundir import DataError


class Documents:
    """A token reader over documents in memory."""

    def __init__(self, *documents: list[int]) -> None:
        self.tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
        self.starts = np.cumsum([0, *map(len, documents)][:-1]).astype(np.int64)
        self.num_tokens = len(self.tokens)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return self.tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        return self.starts[(self.starts >= start) & (self.starts < stop)]


def documents(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 97, length).tolist() for length in lengths]


def build() -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    prepare_model(model, "sdpa")
    return model


def spec(**change: Any) -> EvalSpec:
    values: dict[str, Any] = {"seq_len": 16, "tokens_per_source": 10**6, "micro_batch_size": 2, "backend": "sdpa"}
    return EvalSpec(**values | change)


def done(found: Evaluated | None) -> EvalRecord:
    assert found is not None
    return found.record


def pieces_of(found: Evaluated | None, source: str) -> Pieces:
    assert found is not None
    return found.pieces[source]


def test_the_loss_equals_an_independent_computation_with_transformers() -> None:
    model, texts = build(), documents(0, [16, 16, 16, 16, 16, 2])
    record = done(evaluate(model, {"web": HeldOut(Documents(*texts), "general", 0.25)}, spec()))
    # Documents as long as a row and in step with the rows: transformers' own loss on each is the whole story.
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([text]), labels=torch.tensor([text])).loss.item() for text in texts[:5]]
    found = record.sources["web"]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.bpb == pytest.approx(np.mean(losses) * 0.25 / math.log(2), rel=1e-5)
    assert (found.tokens, found.documents) == (75, 5)


def test_uneven_documents_are_weighted_by_token_and_split_at_row_ends() -> None:
    model, texts = build(), documents(1, [5, 9, 30, 3, 2])
    found = evaluate(model, {"law": HeldOut(Documents(*texts), "domain", 1.0)}, spec())
    record, law = done(found), pieces_of(found, "law")
    pieces = [texts[0], texts[1], texts[2][:2], texts[2][2:18], texts[2][18:], texts[3], texts[4]]
    # Three rows of 16: [5 9 2] [16] [12 3 1]; a row's last label is the first token of the next row, if it is of the same document.
    inputs = [(pieces[0], 4), (pieces[1], 8), (pieces[2] + pieces[3][:1], 2), (pieces[3] + pieces[4][:1], 16)]
    inputs += [(pieces[4], 11), (pieces[5], 2), (pieces[6], 1)]
    losses = []
    with torch.no_grad():
        for tokens, count in inputs:
            ids = torch.tensor([tokens])
            log_probs = model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
            assert len(log_probs) == count
            losses.append(-log_probs.gather(1, ids[0, 1:, None]).sum().item())
    assert record.sources["law"].tokens == 44
    assert record.sources["law"].loss == pytest.approx(sum(losses) / 44, rel=1e-5)
    assert law.document.tolist() == [0, 1, 2, 2, 2, 3, 4]
    assert law.tokens.tolist() == [count for _, count in inputs]
    assert law.nats == pytest.approx(losses, rel=1e-5)
    # The ratio estimator by hand, over the five documents.
    nats, tokens_of = [*losses[:2], sum(losses[2:5]), *losses[5:]], [4, 8, 29, 2, 1]
    squares = [(y - sum(losses) / 44 * x) ** 2 for y, x in zip(nats, tokens_of, strict=True)]
    assert record.sources["law"].stderr == pytest.approx(math.sqrt(5 / 4 * sum(squares)) / 44, rel=1e-4)


@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=25),
    seq_len=st.integers(1, 9),
    tokens=st.integers(1, 60),
)
def test_pieces_are_what_walking_over_the_labels_finds(lengths: list[int], seq_len: int, tokens: int) -> None:
    reader = Documents(*([1] * length for length in lengths))
    if reader.num_tokens < 2:
        return
    extent = _extent("a", reader, spec(seq_len=seq_len, tokens_per_source=tokens))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    walked: dict[tuple[int, int], int] = {}
    for row in extent.rows:
        for place in range(row * extent.seq_len, (row + 1) * extent.seq_len):
            if owner[place] == owner[place + 1]:
                key = (row, int(owner[place]))
                walked[key] = walked.get(key, 0) + 1
    layout = _lay_out(reader, extent)
    pieces = layout.measured(np.zeros(len(layout.tokens)))
    assert pieces.document.tolist() == [document for _, document in walked]
    assert pieces.tokens.tolist() == list(walked.values())
    assert len(layout.first) == len(extent.rows)


def test_only_the_first_rows_up_to_the_token_budget_are_evaluated() -> None:
    reader = Documents(*documents(2, [200]))
    all_rows, first = (
        done(evaluate(build(), {"a": HeldOut(reader, "general", 1.0)}, spec(tokens_per_source=n))) for n in (999, 40)
    )
    assert all_rows.sources["a"].tokens == 12 * 16
    assert first.sources["a"].tokens == 3 * 16


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_the_micro_batch_size_does_not_change_the_result(micro_batch_size: int) -> None:
    sources = {"a": HeldOut(Documents(*documents(3, [30, 50, 21])), "general", 1.0)}
    expected = done(evaluate(build(), sources, spec()))
    found = done(evaluate(build(), sources, spec(micro_batch_size=micro_batch_size)))
    assert found.sources["a"].loss == pytest.approx(expected.sources["a"].loss, rel=1e-6)
    assert found.sources["a"].tokens == expected.sources["a"].tokens


def test_evaluating_twice_gives_the_same_bits_and_leaves_the_mode_alone() -> None:
    model = build().train()
    sources = {"a": HeldOut(Documents(*documents(4, [60])), "general", 1.0)}
    once, again = (evaluate(model, sources, spec(), step=7, tokens_seen=70) for _ in range(2))
    assert done(once) == done(again)
    assert pieces_of(once, "a").nats.tolist() == pieces_of(again, "a").nats.tolist()
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_groups_and_steps_are_filled_in() -> None:
    sources = {
        "a": HeldOut(Documents(*documents(5, [40])), "general", 0.3),
        "b": HeldOut(Documents(*documents(6, [70])), "general", 0.3),
        "c": HeldOut(Documents(*documents(7, [40])), "domain", 0.3),
    }
    record = done(evaluate(build(), sources, spec(), step=5, tokens_seen=640))
    a, b = record.sources["a"], record.sources["b"]
    assert a.loss is not None
    assert b.loss is not None
    assert (a.tokens, b.tokens) == (32, 64)
    assert record.groups["general"].loss == pytest.approx((a.loss + 2 * b.loss) / 3)
    assert record.groups["domain"].loss == record.sources["c"].loss
    assert (record.step, record.tokens_seen) == (5, 640)


def test_a_split_shorter_than_a_row_is_evaluated_as_one_short_row() -> None:
    record = done(evaluate(build(), {"a": HeldOut(Documents(*documents(8, [4, 5])), "general", 1.0)}, spec()))
    assert record.sources["a"].tokens == 7


def test_a_split_without_a_predictable_token_is_refused() -> None:
    with pytest.raises(DataError, match="'tiny': 1 tokens"):
        evaluate(build(), {"tiny": HeldOut(Documents([1]), "general", 1.0)}, spec())


def test_documents_of_one_token_have_no_loss_and_say_so() -> None:
    found = evaluate(build(), {"a": HeldOut(Documents(*[[1]] * 20), "general", 1.0)}, spec())
    record = done(found)
    assert record.sources["a"].loss is None
    assert len(pieces_of(found, "a").nats) == 0
    assert record.errors == ("source 'a': no counted token, every held-out document is one token long",)


def test_a_loss_that_is_not_finite_is_null_and_names_its_source() -> None:
    model = build()
    with torch.no_grad():
        model.get_input_embeddings().weight[42] = float("nan")
    sources = {
        "bad": HeldOut(Documents([1] * 20 + [42] + [1] * 12), "domain", 1.0),
        "good": HeldOut(Documents([1] * 33), "general", 1.0),
    }
    found = evaluate(model, sources, spec())
    record = done(found)
    # The output head is another table, so only rows that read token 42 break.
    assert record.sources["bad"].loss is None
    assert record.sources["bad"].stderr is None
    assert np.isfinite(pieces_of(found, "bad").nats).tolist() == [True, False]
    assert record.groups["domain"].loss is None
    assert record.groups["general"].loss is not None
    assert record.errors == ("source 'bad': the loss is not finite in 1 of 2 rows, first in row 1",)


def test_a_stop_is_obeyed_between_forward_passes() -> None:
    asked = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    model = build().train()
    sources = {"a": HeldOut(Documents(*documents(9, [200])), "general", 1.0)}
    assert evaluate(model, sources, spec(), should_stop=should_stop) is None
    assert len(asked) == 3
    assert model.training


def shared_sources() -> dict[str, HeldOut]:
    return {name: HeldOut(Documents(*documents(10, [30, n])), "general", 1.0) for name, n in (("a", 63), ("b", 8))}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    calls: list[int] = []
    model = build()
    model.register_forward_hook(lambda *_: calls.append(1))
    found = evaluate(model, shared_sources(), spec())
    write_eval(Path(folder, f"record{rank}.json"), done(found))
    np.savez(Path(folder, f"pieces{rank}.npz"), **{name: by_document(pieces_of(found, name)).nats for name in "ab"})
    passes = len(calls)
    stopped = evaluate(model, shared_sources(), spec(), should_stop=lambda: rank == 1 and len(calls) == passes + 1)
    Path(folder, f"passes{rank}").write_text(f"{passes} then {len(calls) - passes}, {stopped}")
    dist.destroy_process_group()


def test_two_ranks_agree_with_one_make_equally_many_passes_and_stop_together(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    here = evaluate(build(), shared_sources(), spec())
    alone = done(here)
    texts = [(tmp_path / f"record{rank}.json").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    together = read_eval(tmp_path / "record0.json")
    for name, found in alone.sources.items():
        assert found.tokens == together.sources[name].tokens
        assert found.loss == pytest.approx(together.sources[name].loss, rel=1e-7)
        assert found.stderr == pytest.approx(together.sources[name].stderr, rel=1e-6)
        for rank in (0, 1):
            with np.load(tmp_path / f"pieces{rank}.npz") as parts:
                assert parts[name] == pytest.approx(by_document(pieces_of(here, name)).nats, rel=1e-6)
    assert {(tmp_path / f"passes{rank}").read_text() for rank in (0, 1)} == {"3 then 1, None"}
