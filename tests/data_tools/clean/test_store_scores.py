"""One perplexity per document of a store: right, in its order, the same after a restart; usable for views."""

import json
import math
from pathlib import Path

import numpy as np
import orjson
import pytest

from cpt.rundir import DataError
from data_tools.choose_documents import read_scores
from data_tools.clean import store_scores
from data_tools.clean.ngram import NgramModel
from data_tools.clean.ngram_training import TrainOptions, train_ngram
from data_tools.clean.store_scores import ScoreRequest, score_store
from data_tools.store_builder import StoreRequest, build_store
from data_tools.train_tokenizer import train_bpe

TEXTS = [
    "the court shall hear the case",
    "zebras dance at night",
    "...",
    "the case of the court\nthe case",
    "the zebras",
] * 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ScoreRequest:
    folder = tmp_path_factory.mktemp("scores")
    tokenizer = train_bpe(TEXTS, out=folder / "tokenizer", vocab_size=300)
    (folder / "raw.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS))
    build_store(StoreRequest((str(folder / "raw.jsonl"),), tokenizer, folder / "store", "law", "law", 0.0))
    train_ngram(["the court shall hear the case\n" * 3], TrainOptions()).save(folder / "model.npz")
    return ScoreRequest(folder / "store" / "train", folder / "model.npz", tokenizer, folder / "scores.npy")


def test_every_document_has_the_perplexity_of_its_text(made: ScoreRequest) -> None:
    facts = score_store(made)
    model = NgramModel.load(made.model)
    scores = np.load(made.out, allow_pickle=False)
    assert scores.dtype == np.float32 and scores == pytest.approx([model.perplexity(text) for text in TEXTS], rel=1e-6)
    assert facts["documents"] == len(TEXTS) and facts["percentiles"]["50"] == pytest.approx(np.median(scores))
    assert not made.out.with_suffix(".parts").exists()


def test_the_label_names_store_and_model_and_views_read_it(made: ScoreRequest) -> None:
    from cpt.data.store_selection import open_split

    score_store(made)
    about = json.loads(made.out.with_suffix(".json").read_text())
    store = open_split(made.store)
    assert about["kind"] == "perplexity" and about["store_content_hash"] == store.manifest.content_hash
    assert len(read_scores(made.out, store)) == len(TEXTS)


def test_a_document_without_words_has_no_score() -> None:
    assert math.isnan(store_scores._finite(math.inf)) and store_scores._finite(2.5) == 2.5


def test_a_run_that_was_cut_goes_on_with_what_is_missing(made: ScoreRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    score_store(made)
    whole = made.out.read_bytes()
    made.out.unlink()
    monkeypatch.setattr(store_scores, "_PART", 4)
    scored: list[int] = []
    real = store_scores._score_part

    def fails_at_three(request: ScoreRequest, parts: Path, number: int) -> dict[str, object]:
        scored.append(number)
        if number == 3 and scored.count(3) == 1:
            raise KeyboardInterrupt
        return real(request, parts, number)

    monkeypatch.setattr(store_scores, "_score_part", fails_at_three)
    with pytest.raises(KeyboardInterrupt):
        score_store(made)
    assert not made.out.exists()
    score_store(made)
    assert scored == [0, 1, 2, 3, 3, 4, 5, 6] and made.out.read_bytes() == whole


def test_two_workers_write_the_same(made: ScoreRequest, tmp_path: Path) -> None:
    from dataclasses import replace

    score_store(made)
    score_store(replace(made, out=tmp_path / "two.npy", workers=2))
    assert (tmp_path / "two.npy").read_bytes() == made.out.read_bytes()


def test_another_tokenizer_or_a_name_without_npy_is_refused(made: ScoreRequest, tmp_path: Path) -> None:
    from dataclasses import replace

    other = train_bpe(["something else"], out=tmp_path / "other", vocab_size=260)
    with pytest.raises(DataError, match="was made with"):
        score_store(replace(made, tokenizer=other))
    with pytest.raises(DataError, match=r"ends in \.npy"):
        score_store(replace(made, out=tmp_path / "scores"))
