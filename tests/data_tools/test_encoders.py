"""Encoders add nothing, agree with `tokenizers`, survive long texts, and know who they are."""

import json
from pathlib import Path

import numpy as np
import pytest

from cpt.rundir import DataError
from data_tools import encoders
from data_tools.encoders import load_decoder, load_encoder, tokenizer_fingerprint
from data_tools.train_tokenizer import EOS_TOKEN, train_bpe

TEXTS = ["The cat sat on the mat, and the dog did not mind.", "Über uns: 3.14 ist rund 😀", "x  = [1, 2]\n\ty"] * 4


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(TEXTS, out=tmp_path_factory.mktemp("bpe"), vocab_size=300)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sp") / "toy"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_prefix=str(prefix), vocab_size=320, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False, normalization_rule_name="identity",
    )  # fmt: skip
    return prefix.with_suffix(".model")


def rows(encoder: encoders.Encoder, texts: encoders.Texts) -> list[list[int]]:
    ids, lengths = encoder.encode_batch(texts)
    assert ids.dtype == np.uint32 and lengths.dtype == np.int64
    return [row.tolist() for row in np.split(ids, lengths.cumsum()[:-1])]


def test_ids_are_those_of_the_tokenizers_library_without_special_tokens(bpe: Path) -> None:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    encoder = load_encoder(bpe, sample=TEXTS)
    assert rows(encoder, TEXTS) == [plain.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert encoder.vocab_size == plain.get_vocab_size() and encoder.eos_id == 0


def test_a_template_that_adds_bos_is_ignored(bpe: Path, tmp_path: Path) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": EOS_TOKEN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {EOS_TOKEN: {"id": EOS_TOKEN, "ids": [0], "tokens": [EOS_TOKEN]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    encoder = load_encoder(tmp_path, eos_token=EOS_TOKEN, sample=TEXTS)
    assert rows(encoder, TEXTS) == rows(load_encoder(bpe), TEXTS)


def test_gigatoken_works_only_behind_a_sample(bpe: Path) -> None:
    pytest.importorskip("gigatoken")
    assert load_encoder(bpe).backend == "tokenizers"
    proved = load_encoder(bpe, sample=TEXTS)
    assert proved.backend == "gigatoken" and proved.note == "gigatoken (equal to tokenizers on 12 sampled documents)"
    assert rows(proved, TEXTS) == rows(load_encoder(bpe), TEXTS)


def test_gigatoken_that_differs_on_the_sample_is_not_used(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    real = gigatoken.Tokenizer.encode_batch
    monkeypatch.setattr(
        gigatoken.Tokenizer,
        "encode_batch",
        lambda self, texts, **options: real(self, [text[:-1] for text in texts], **options),
    )
    encoder = load_encoder(bpe, sample=TEXTS)
    assert encoder.backend == "tokenizers" and "gigatoken gives other ids for 'The cat sat" in encoder.note


def test_a_machine_without_gigatoken_falls_back_and_says_so(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    encoder = load_encoder(bpe, sample=TEXTS)
    assert encoder.backend == "tokenizers" and "install gigatoken" in encoder.note


def test_sentencepiece_is_encoded_by_its_own_library(sentencepiece_model: Path) -> None:
    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    encoder = load_encoder(sentencepiece_model, sample=TEXTS)
    assert rows(encoder, TEXTS) == plain.encode(TEXTS)
    assert (encoder.backend, encoder.eos_id, encoder.vocab_size) == ("sentencepiece", 2, plain.get_piece_size())
    assert load_decoder(sentencepiece_model)(encoder.encode_batch(TEXTS[:1])[0].tolist()) == TEXTS[0]


def test_texts_that_spell_control_tokens_go_to_sentencepiece_and_others_to_gigatoken(sentencepiece_model: Path) -> None:
    exact = load_encoder(sentencepiece_model).encode_batch

    def fast(texts: encoders.Texts) -> tuple[encoders.Ids, np.ndarray]:
        return np.full(len(texts), 7, np.uint32), np.ones(len(texts), np.int64)

    encode = encoders._around_controls(fast, exact, sentencepiece_model)
    assert encode(["a", "b"])[0].tolist() == [7, 7]
    ids, lengths = encode(["a", "some <s> text", "b"])
    spelled = exact(["some <s> text"])[0].tolist()
    assert ids.tolist() == [7, *spelled, 7] and lengths.tolist() == [1, len(spelled), 1]


def test_a_sentencepiece_model_that_defines_bos_uses_it(sentencepiece_model: Path) -> None:
    assert load_encoder(sentencepiece_model).bos_id == 1
    assert load_encoder(sentencepiece_model, bos_token="none").bos_id is None
    assert load_encoder(sentencepiece_model, bos_token="</s>").bos_id == 2


@pytest.mark.parametrize("which", ["bpe", "sentencepiece_model"])
def test_strings_and_their_utf8_bytes_have_the_same_ids(which: str, request: pytest.FixtureRequest) -> None:
    encoder = load_encoder(request.getfixturevalue(which), sample=TEXTS)
    assert rows(encoder, TEXTS) == rows(encoder, [text.encode() for text in TEXTS])


@pytest.mark.parametrize("which", ["bpe", "sentencepiece_model"])
def test_a_long_text_encoded_in_pieces_has_the_ids_of_the_whole(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(which)
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    long_text = " ".join(TEXTS * 5)
    encoder = load_encoder(path, sample=[*TEXTS, long_text])
    assert encoder.cut is not None
    pieces = list(encoder.cut.pieces(long_text, 50))
    assert len(pieces) > 10 and max(map(len, pieces)) < 120
    assert encoder.encode_batch(pieces)[0].tolist() == encoder.encode_batch([long_text])[0].tolist()


def test_the_fingerprint_follows_the_content_and_not_the_formatting(bpe: Path, tmp_path: Path) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(dict(reversed(content.items())), indent=4) + "\n")
    assert tokenizer_fingerprint(file) == tokenizer_fingerprint(bpe) == load_encoder(bpe).facts.fingerprint
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    assert tokenizer_fingerprint(file) != tokenizer_fingerprint(bpe)


def test_training_twice_gives_the_same_bytes_and_transformers_loads_them(bpe: Path, tmp_path: Path) -> None:
    train_bpe(TEXTS, out=tmp_path, vocab_size=300)
    assert (tmp_path / "tokenizer.json").read_bytes() == (bpe / "tokenizer.json").read_bytes()
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(str(bpe))
    assert loaded.eos_token_id == 0 and loaded.decode(loaded.encode(TEXTS[1])) == TEXTS[1]


def test_a_tokenizer_without_eos_asks_for_one(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=r"names no EOS token; fix: --eos-token TOKEN, .*<\|endoftext\|>"):
        load_encoder(tmp_path)
    assert load_encoder(tmp_path, eos_token=EOS_TOKEN).eos_id == 0
    with pytest.raises(DataError, match=r"has no token '</s>'"):
        load_encoder(tmp_path, eos_token="</s>")


def test_the_eos_of_an_older_folder_is_in_the_special_tokens_map(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": EOS_TOKEN}}))
    assert load_encoder(tmp_path).eos_id == 0


def test_an_unknown_eos_for_sentencepiece_is_refused(sentencepiece_model: Path) -> None:
    with pytest.raises(DataError, match=r"has no token '<end>'.*</s>"):
        load_encoder(sentencepiece_model, eos_token="<end>")
    assert load_encoder(sentencepiece_model, eos_token="<s>").eos_id == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not JSON"),
        ("tokenizer.json", b"[]", "holds a list"),
        ("tokenizer.json", b"{}", "has no 'model'"),
        ("tokenizer.json", b'{"model": {"type": "None"}}', "`tokenizers` cannot load it"),
        ("toy.model", b"junk", "sentencepiece cannot load it"),
        ("vocab.txt", b"a", "neither tokenizer.json nor a .model in this folder"),
    ],
)
def test_a_broken_tokenizer_is_refused_with_its_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_encoder(tmp_path)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such tokenizer"):
        load_encoder(tmp_path / "gone")
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a.txt: not a tokenizer"):
        load_encoder(tmp_path / "a.txt")
