"""New tokenizers of every kind: one set of ids for store and transformers, every text comes back, equal bytes."""

import json
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cpt.rundir import DataError
from data_tools.encoders import load_decoder, load_encoder
from data_tools.sources import ReadOptions
from data_tools.train_tokenizer import EOS_TOKEN
from data_tools.vocabulary.fertility import compare_tokenizers, render_comparison
from data_tools.vocabulary.samples import make_samples
from data_tools.vocabulary.show import render_training
from data_tools.vocabulary.train import KINDS, TrainRequest, train_tokenizer

LINES = [
    "def add(a, b):\n    return a + b  # 12 and 345\n",
    "Die Prüfung der Straße, über 300 Absätze.\r\n\r\n\tZweiter  Satz.",
    "日本語の文章。もう一つの文。",
    "The quick brown fox jumps over the lazy dog, again and again.",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "mixed.jsonl"
    texts = [f"{line} {i}" for i in range(60) for line in LINES]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request: pytest.FixtureRequest, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> TrainRequest:
    asked = TrainRequest(
        (corpus,), tmp_path_factory.mktemp("tok") / "t", vocab_size=420, kind=request.param, special_tokens=("<|sep|>",)
    )
    report = train_tokenizer(asked)
    assert 300 <= report["vocab_size"] <= 420 and report["sources"]["mixed"]["held_back"]
    assert report["sources"]["mixed"]["fertility"]["bytes_per_token"] > 1.3
    return asked


def test_transformers_and_the_store_builder_give_equal_ids(trained: TrainRequest) -> None:
    from transformers import AutoTokenizer

    encoder, loaded = load_encoder(trained.out), AutoTokenizer.from_pretrained(trained.out)
    for text in [*LINES, "  two  spaces \t\n\n and 漢字 ½", "end.\n"]:
        assert loaded(text, add_special_tokens=False)["input_ids"] == encoder.encode_batch([text])[0].tolist()
    assert loaded.eos_token_id == encoder.eos_id and encoder.bos_id is None and len(loaded) == encoder.vocab_size
    assert "<|sep|>" in loaded.all_special_tokens and len(loaded("<|sep|>", add_special_tokens=False)["input_ids"]) == 1


@given(st.text(max_size=80))
def test_every_text_comes_back(trained: TrainRequest, text: str) -> None:
    ids = load_encoder(trained.out).encode_batch([text])[0].tolist()
    expected = text if trained.kind == "bpe" else text.replace("\u2581", " ")  # the space mark of sentencepiece
    assert load_decoder(trained.out)(ids) == expected


def test_the_same_texts_give_the_same_bytes(trained: TrainRequest, tmp_path: Path) -> None:
    train_tokenizer(
        TrainRequest(trained.sources, tmp_path / "t", 420, trained.kind, special_tokens=trained.special_tokens)
    )
    for file in trained.out.iterdir():
        assert file.read_bytes() == (tmp_path / "t" / file.name).read_bytes()


def test_impossible_requests_are_refused(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no room for 256 bytes.*fix: 257"):
        train_tokenizer(TrainRequest((corpus,), tmp_path / "t", vocab_size=256))
    with pytest.raises(DataError, match=r"sentencepiece cannot learn 270 tokens.*--vocab-size"):
        train_tokenizer(TrainRequest((corpus,), tmp_path / "t", vocab_size=270, kind="spm-bpe"))
    with pytest.raises(DataError, match="--kind wordpiece"):
        train_tokenizer(TrainRequest((corpus,), tmp_path / "t", kind="wordpiece"))
    for kind, tokens in (("bpe", ("<x>", "<x>")), ("bpe", ("",)), ("bpe", (EOS_TOKEN,)), ("spm-bpe", ("</s>",))):
        with pytest.raises(DataError, match="--special-token"):
            train_tokenizer(TrainRequest((corpus,), tmp_path / "t", kind=kind, special_tokens=tokens))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(DataError, match="already holds something"):
        train_tokenizer(TrainRequest((corpus,), tmp_path / "full"))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_tokenizers_are_compared_on_the_same_held_back_texts(corpus: str, tmp_path: Path) -> None:
    paths = [tmp_path / str(size) for size in (300, 420)]
    for path in paths:
        train_tokenizer(TrainRequest((corpus,), path, vocab_size=int(path.name)))
    facts = compare_tokenizers(paths, make_samples([corpus], sample_bytes=10**6, read=ReadOptions()))
    small, large = (facts["tokenizers"][str(path)]["sources"]["mixed"] for path in paths)
    assert small["bytes"] == large["bytes"] and small["bytes_per_token"] < large["bytes_per_token"]


def test_names_that_look_like_markup_are_shown_as_they_are(corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "tok[i]"
    facts = train_tokenizer(TrainRequest((f"web[red]={corpus}",), out, vocab_size=300))
    compared = compare_tokenizers([out], make_samples([f"web[red]={corpus}"], sample_bytes=10**6, read=ReadOptions()))
    console = Console(file=StringIO(), width=300)
    console.print(render_training(facts), render_comparison(compared))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("web[red]") == 2 and f"{out}:" in shown
