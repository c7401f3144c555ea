"""A tiny run whose tokenizer is known: what its evaluations leave, and one document through base and checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cpt.config import ConfigError
from cpt.eval.document_losses import document_facts
from cpt.eval.document_pieces import by_source
from cpt.eval.document_texts import document_texts_file, read_document_texts
from cpt.eval.results import pieces_file, read_pieces
from cpt.rundir import DataError, RunDir

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 8


def write_tokenizer(folder: Path, *, first_word: str) -> Path:
    """64 words; the first of them begins like a tag."""
    from tokenizers import Tokenizer, models

    vocab = {"#": 0, first_word: 1} | {f"w{number}": number for number in range(2, 64)}
    folder.mkdir()
    Tokenizer(models.WordLevel(vocab, "#")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def run(made_once: Callable[..., Workshop]) -> Workshop:
    def make(shop: Workshop) -> None:
        from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split
        from data_tools.encoders import tokenizer_fingerprint

        tokenizer = write_tokenizer(shop.root / "tokenizer", first_word="<b>w1")
        facts = TokenizerFacts("words", tokenizer_fingerprint(tokenizer), "WordLevel")
        for name, domain, stride in (("prose", "general", 7), ("code", "code", 11)):
            for split, rows in (("train", range(400)), ("heldout", range(400, 430))):
                documents = [[*((row * 13 + stride * i) % 63 + 1 for i in range(20 + row % 40)), 0] for row in rows]
                label = StoreLabel(name, domain, split, 64, 0, facts)
                write_split(shop.root / name / split, label, [documents], utf8_bytes=3 * sum(map(len, documents)))
        file = shop.run_file("words", {"model.tokenizer": str(tokenizer), "eval.tokens_per_source": 10**6})
        done = shop.cpt("train", file)
        assert done.code == 0, done.text

    return made_once("words_run", make)


def evals(shop: Workshop) -> Path:
    return RunDir(shop.run_dir("words")).evals


def checkpoint(shop: Workshop) -> Path:
    return RunDir(shop.run_dir("words")).checkpoint(STEPS)


def test_training_keeps_the_same_pieces_at_every_step_and_the_loss_is_theirs(run: Workshop) -> None:
    before, after = (by_source(read_pieces(pieces_file(evals(run), step))) for step in (0, STEPS))
    for name in ("prose", "code"):
        assert before[name].are_those_of(after[name])
        source = run.evaluation("words", STEPS)["sources"][name]
        assert source["tokens"] == after[name].tokens.sum()
        assert source["loss"] == pytest.approx(after[name].nats.sum() / source["tokens"], rel=1e-12)
        assert 0 < source["stderr"] < 0.5
        assert set(after[name].document.tolist()) == set(range(30))


def test_how_documents_begin_is_kept_once_and_readable_without_store_or_tokenizer(run: Workshop) -> None:
    texts = read_document_texts(document_texts_file(evals(run)))
    assert len(texts) == 60
    ids = [(403 * 13 + 7 * i) % 63 + 1 for i in range(23)]
    assert texts["prose", 3].split()[:10] == [f"w{token}" if token > 1 else "<b>w1" for token in ids[:10]]
    facts = document_facts(evals(run))
    assert (facts["base_step"], facts["step"]) == (0, STEPS)
    assert facts["sources"]["code"]["change"] < 0
    assert all(entry["text"] for entry in facts["sources"]["code"]["most_gained"])


def test_evaluating_the_checkpoint_again_leaves_the_same(run: Workshop) -> None:
    from cpt.offline import evaluate_checkpoint

    file = pieces_file(evals(run), STEPS)
    record, trained = run.evaluation("words", STEPS), by_source(read_pieces(file))
    texts = document_texts_file(evals(run)).read_bytes()
    file.unlink()
    found = evaluate_checkpoint(checkpoint(run))
    again = by_source(read_pieces(file))
    for name, pieces in trained.items():
        assert pieces.are_those_of(again[name])
        np.testing.assert_allclose(pieces.nats, again[name].nats, rtol=1e-5)
        assert found.sources[name].stderr == pytest.approx(record["sources"][name]["stderr"], rel=1e-4)
    assert document_texts_file(evals(run)).read_bytes() == texts


def test_the_tokens_of_a_document_add_up_to_its_loss(run: Workshop) -> None:
    from cpt.eval.token_view import view_facts
    from cpt.offline import view_document

    first = view_document(checkpoint(run), "prose", 0)  # starts with a row, so its rows are the evaluation's
    assert first.document_tokens == len(first.texts) == 21
    assert first.step == STEPS
    for step, losses in ((0, first.before), (STEPS, first.after)):
        table = pq.read_table(pieces_file(evals(run), step)).to_pylist()
        own = [row for row in table if (row["source"], row["document"]) == ("prose", 0)]
        assert len(own) == 1 and own[0]["tokens"] == 20
        assert sum(loss for loss in losses if loss is not None) == pytest.approx(own[0]["nats"], rel=1e-5)
    assert view_facts(first)["compared_tokens"] == 20
    assert first.texts[0].strip() in {f"w{number}" for number in range(2, 64)} | {"<b>w1"}


def test_the_verbs_show_documents_and_write_the_page(run: Workshop, tmp_path: Path) -> None:
    listed = run.cpt("eval", "documents", run.run_dir("words"))
    assert listed.code == 0 and "gained most" in listed.out and "30 documents" in listed.out, listed.text
    as_json = run.cpt("eval", "documents", run.run_dir("words"), "--json")
    assert json.loads(as_json.out)["sources"].keys() == {"prose", "code"}
    page = tmp_path / "tokens.html"
    shown = run.cpt("eval", "tokens", checkpoint(run), "--document", "code:3", "--out", page)
    assert shown.code == 0 and "code document 3, base to step 8" in shown.out, shown.text
    assert "&lt;b&gt;w1" in page.read_text() and "<b>w1" not in page.read_text()
    wrong = run.cpt("eval", "tokens", checkpoint(run), "--document", "law:3")
    assert wrong.code == 2 and "names no source of this run" in wrong.err and "prose, code" in wrong.err


@pytest.mark.parametrize("number", [-1, 30])
def test_a_document_that_there_is_not_is_refused(run: Workshop, number: int) -> None:
    from cpt.offline import view_document

    with pytest.raises(ConfigError, match="numbered 0 to 29"):
        view_document(checkpoint(run), "prose", number)


def test_text_is_never_made_with_another_tokenizer_than_the_stores(run: Workshop, tmp_path: Path) -> None:
    from cpt.data.token_store import TokenStore
    from cpt.eval.held_out_files import keep_beginnings, store_decoder
    from cpt.eval.perplexity import Evaluated
    from cpt.eval.records import EvalRecord

    store = TokenStore.open(run.root / "prose" / "heldout")
    other = write_tokenizer(tmp_path / "other", first_word="w1")
    with pytest.raises(DataError, match="is not the tokenizer that made the store"):
        store_decoder(other, store)
    found = Evaluated(EvalRecord(0, 0, {}, {}), {"prose": by_source(read_pieces(pieces_file(evals(run), 0)))["prose"]})
    rundir = RunDir(tmp_path)
    rundir.evals.mkdir()
    assert "is not the tokenizer" in keep_beginnings(rundir, found, {"prose": store}, other)
    assert "neither tokenizer.json nor" in keep_beginnings(rundir, found, {"prose": store}, tmp_path)
    assert keep_beginnings(rundir, found, {"prose": store}, None) == ""
    assert not document_texts_file(rundir.evals).exists()
    assert keep_beginnings(rundir, found, {"prose": store}, run.root / "tokenizer") == ""
    assert len(read_document_texts(document_texts_file(rundir.evals))) == 30
