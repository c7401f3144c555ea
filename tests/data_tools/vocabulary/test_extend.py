"""Extended tokenizers: old ids stay, texts come back, new merges only join what the base left apart."""

import json
import random
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cpt.data.vocabulary import VocabularyExtension, read_extension
from cpt.rundir import DataError
from data_tools.encoders import load_decoder, load_encoder
from data_tools.train_tokenizer import EOS_TOKEN, train_bpe
from data_tools.vocabulary.base_tokenizer import kind_of_pieces
from data_tools.vocabulary.extend import ExtendRequest, extend_tokenizer
from data_tools.vocabulary.merges import MARKS, NEVER, PLAIN, SPACE, SPACE_MARKS, SPACE_PLAIN, SPACES
from data_tools.vocabulary.show import render_extension
from data_tools.vocabulary.train import TrainRequest, train_tokenizer

SENTENCE = "the cat sat on the mat and the dog ran over the old bridge to the town every day in the sun"
GENERAL = SENTENCE.split()
MEDICAL = [
    "myocarditis",
    "pericarditis",
    "thrombocytopenia",
    "血栓症",
    "心筋炎",
    "electrocardiogram",
    "½-dose",
    "µg/ml",
]


def write_corpus(path: Path, words: list[str], *, documents: int = 200, seed: int = 0) -> str:
    chosen = random.Random(seed)
    lines = [" ".join(chosen.choices(words, k=40)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("corpora")
    medical = write_corpus(root / "medical.jsonl", [*MEDICAL, *GENERAL[:4]])
    return f"general={write_corpus(root / 'general.jsonl', GENERAL)}", f"medical={medical}"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe([" ".join(GENERAL)] * 5, out=tmp_path_factory.mktemp("base"), vocab_size=300)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory, corpora: tuple[str, str]) -> Path:
    out = tmp_path_factory.mktemp("pieces") / "base"
    train_tokenizer(TrainRequest((corpora[0],), out, vocab_size=310, kind="spm-bpe"))
    return out


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, pieces: Path) -> Path:
    """The same sentencepiece model as a tokenizer.json with byte fallback."""
    from transformers import AutoTokenizer

    out = tmp_path_factory.mktemp("converted")
    settings = json.loads((pieces / "tokenizer_config.json").read_text())
    (out / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    (out / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"}))
    AutoTokenizer.from_pretrained(out).backend_tokenizer.save(str(out / "tokenizer.json"))
    return out


def extend(base: Path, corpora: tuple[str, ...], out: Path, **change: Any) -> dict[str, Any]:
    fields = {"num_tokens": 60, "min_count": 20, **change}
    return extend_tokenizer(ExtendRequest(base, corpora, out, **fields))


@pytest.fixture(scope="module", params=["byte_level", "pieces", "converted"])
def extended(
    request: pytest.FixtureRequest, corpora: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    base = request.getfixturevalue(request.param)
    out = tmp_path_factory.mktemp("extended") / request.param
    return base, out, extend(base, corpora, out)


def ids_of(tokenizer: Path, text: str) -> list[int]:
    return [int(i) for i in load_encoder(tokenizer).encode_batch([text])[0]]


def put_back(ids: list[int], extension: VocabularyExtension) -> list[int]:
    first = extension.base_vocab_size
    return [old for i in ids for old in ([i] if i < first else extension.subtokens[i - first])]


def test_domain_text_takes_fewer_tokens_and_general_text_is_left_alone(extended: Any) -> None:
    _, _, report = extended
    medical, general = report["sources"]["medical"], report["sources"]["general"]
    assert medical["after"]["tokens"] < 0.6 * medical["before"]["tokens"]
    assert general["after"]["tokens"] <= general["before"]["tokens"] and general["learned_from"] is False
    texts = {row["text"].strip() for row in report["tokens"]}
    assert {"myocarditis", "electrocardiogram"} <= texts
    assert report["new_tokens"] == len(report["tokens"]) <= 60


def test_what_a_token_saves_is_its_count_times_the_tokens_it_replaces(extended: Any) -> None:
    _, out, report = extended
    extension = read_extension(out)
    assert extension is not None
    for row in report["tokens"]:
        parts = extension.subtokens[row["id"] - extension.base_vocab_size]
        assert row["tokens_saved_in_sample"] == row["in_sample"] * (len(parts) - 1)
        assert set(row["held_back"]) == {"general", "medical"}


def test_a_text_that_no_new_merge_fits_keeps_its_ids(extended: Any) -> None:
    base, out, _ = extended
    text = "q w 12:30 + 45 = [X]\n"
    assert ids_of(out, text) == ids_of(base, text)


@given(st.lists(st.sampled_from([*GENERAL, *MEDICAL, "\n", "  ", "2024", "é", "\u3000", "😀", "x" * 30]), max_size=30))
def test_putting_the_old_ids_back_gives_what_the_base_gives(extended: Any, words: list[str]) -> None:
    base, out, _ = extended
    text = " ".join(words)
    extension = read_extension(out)
    assert extension is not None
    assert put_back(ids_of(out, text), extension) == ids_of(base, text)


@given(st.text(max_size=60))
def test_any_text_comes_back_as_from_the_base(extended: Any, text: str) -> None:
    base, out, _ = extended
    assert load_decoder(out)(ids_of(out, text)) == load_decoder(base)(ids_of(base, text))


def test_transformers_gives_the_same_ids(extended: Any) -> None:
    from transformers import AutoTokenizer

    _, out, report = extended
    text = " ".join(MEDICAL + GENERAL)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids_of(out, text)
    assert len(loaded) == report["vocab_size"]


def test_the_same_texts_give_the_same_bytes(extended: Any, corpora: tuple[str, str], tmp_path: Path) -> None:
    base, out, _ = extended
    extend(base, corpora, tmp_path / base.name / out.name)
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / base.name / out.name / file.name).read_bytes(), file.name


def test_an_extended_tokenizer_can_be_extended_again(extended: Any, corpora: tuple[str, str], tmp_path: Path) -> None:
    _, out, report = extended
    law = write_corpus(tmp_path / "law.jsonl", ["plaintiff", "defendant", "estoppel", *GENERAL])
    again = extend(out, (f"law={law}",), tmp_path / "twice")
    assert again["base_vocab_size"] == report["vocab_size"] < again["vocab_size"]
    twice, text = read_extension(tmp_path / "twice"), " ".join([*MEDICAL, *GENERAL, "plaintiff estoppel"])
    assert twice is not None and put_back(ids_of(tmp_path / "twice", text), twice) == ids_of(out, text)


def test_added_tokens_keep_their_ids_although_the_model_does_not_list_them(
    byte_level: Path, corpora: tuple[str, str], tmp_path: Path
) -> None:
    from tokenizers import AddedToken, Tokenizer

    base = tmp_path / "base"
    base.mkdir()
    tokenizer = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|pad|>"])
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    tokenizer.save(str(base / "tokenizer.json"))
    extend(base, corpora, tmp_path / "out", eos_token=EOS_TOKEN)
    found = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    size = tokenizer.get_vocab_size()
    assert [found.token_to_id(token) for token in (EOS_TOKEN, "<|pad|>", "    ")] == [0, size - 2, size - 1]
    for text in (f"a{EOS_TOKEN}b    c<|pad|>", "the cat     sat"):
        assert found.encode(text).ids == tokenizer.encode(text).ids


def test_merges_stay_in_the_form_of_the_base(byte_level: Path, corpora: tuple[str, str], tmp_path: Path) -> None:
    content = json.loads((byte_level / "tokenizer.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # as older versions wrote them
    (old / "tokenizer.json").write_text(json.dumps(content))
    extend(old, corpora, tmp_path / "out", eos_token=EOS_TOKEN)
    merges = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges) and len(merges) > len(content["model"]["merges"])


def test_what_cannot_be_extended_is_refused_with_a_way_out(
    byte_level: Path, corpora: tuple[str, str], tmp_path: Path
) -> None:
    unigram = tmp_path / "unigram"
    train_tokenizer(TrainRequest(corpora, unigram, vocab_size=330, kind="spm-unigram"))
    with pytest.raises(DataError, match=r"unigram model cannot be extended.*train-tokenizer"):
        extend(unigram, corpora, tmp_path / "out")
    wordpiece = tmp_path / "wordpiece.json"
    wordpiece.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 0}}}))
    with pytest.raises(DataError, match="WordPiece model cannot be extended"):
        extend(wordpiece, corpora, tmp_path / "out")
    with pytest.raises(DataError, match="measured and not learned from"):
        extend(byte_level, corpora[:1], tmp_path / "out")
    with pytest.raises(DataError, match="has no name"):  # general text would be learned from
        extend(byte_level, (corpora[0].removeprefix("general="), corpora[1]), tmp_path / "out")
    with pytest.raises(DataError, match=r"occurs 100000 times.*--min-count"):
        extend(byte_level, corpora, tmp_path / "out", min_count=100_000)
    with pytest.raises(DataError, match="--num-tokens 0"):
        extend(byte_level, corpora, tmp_path / "out", num_tokens=0)
    with pytest.raises(DataError, match="already holds something"):
        extend(byte_level, corpora, unigram)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))


def test_a_piece_model_with_tokens_added_behind_it_is_refused(
    pieces: Path, corpora: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 310, "</s>": 1}))
    with pytest.raises(DataError, match=r"\['<pad>'\] are added behind its 310 pieces.*tokenizer\.json"):
        extend(tmp_path, corpora, tmp_path / "out")


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        *(("▁heart", SPACE_PLAIN), ("heart", PLAIN), ("心筋", PLAIN), ("हृदय", PLAIN), ("▁", SPACE), ("▁▁", SPACES)),
        *(("。", MARKS), ("▁(", SPACE_MARKS), ("1", NEVER), ("a1", NEVER), ("a.", NEVER), ("a▁b", NEVER), ("", NEVER)),
        *(("▁▁a", NEVER), ("a▁", NEVER)),
    ],
)
def test_pieces_hold_letters_or_marks_and_a_space_in_front(piece: str, kind: int) -> None:
    assert kind_of_pieces(piece) == kind


def test_a_token_that_looks_like_markup_is_shown_as_it_is(byte_level: Path, tmp_path: Path) -> None:
    code = write_corpus(tmp_path / "code.jsonl", ["[/]", "[red]"])
    facts = extend(byte_level, (f"code[b]={code}",), tmp_path / "tok[i]")
    assert any("[/]" in row["text"] for row in facts["tokens"])
    console = Console(file=StringIO(), width=300)
    console.print(render_extension(facts))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(repr(row["text"]) in shown for row in facts["tokens"])
    assert shown.count("code[b]") == 2 and f"model.tokenizer={tmp_path / 'tok[i]'}" in shown
