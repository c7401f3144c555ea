"""A store to Megatron's files and back: Megatron's own reader sees equal tokens, and damage is found before any use."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.token_store import StoreLabel, TokenizerFacts, TokenStore, write_split
from cpt.rundir import DataError
from data_tools.interop import megatron_import
from data_tools.interop.byte_counts import byte_counter
from data_tools.interop.megatron_export import export_megatron
from data_tools.interop.megatron_import import MegatronRequest, import_megatron
from data_tools.interop.megatron_index import HEADER, open_index
from data_tools.train_tokenizer import train_bpe

FACTS = TokenizerFacts("t", "f" * 64, "T")
SHARDS = [[[5, 7, 0], [9, 0]], [], [[4, 0], [1, 2, 3, 0]]]


def store(folder: Path, *, vocab_size: int = 100, shards: list[list[list[int]]] = SHARDS) -> Path:
    write_split(folder, StoreLabel("s", "general", "train", vocab_size, 0, FACTS), shards)
    return folder


def documents_of(path: Path) -> list[list[int]]:
    return [document.tolist() for document in TokenStore.open(path).documents()]


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_megatron_reads_an_exported_store(tmp_path: Path, vocab_size: int) -> None:
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    shards = [*SHARDS, [[vocab_size - 1, 0]]]
    facts = export_megatron(
        store(tmp_path / "store", vocab_size=vocab_size, shards=shards), tmp_path / "m" / "corpus.v1"
    )
    found = IndexedDataset(str(tmp_path / "m" / "corpus.v1"))
    expected = [document for shard in shards for document in shard]
    assert [found[i].tolist() for i in range(len(found))] == expected
    assert found.document_indices.tolist() == list(range(len(expected) + 1))
    assert facts["documents"] == len(expected) and facts["dtype"] == ("uint16" if vocab_size == 100 else "int32")
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == ["corpus.v1.bin", "corpus.v1.idx"]


def test_export_refuses_to_overwrite_and_damaged_shards(tmp_path: Path) -> None:
    folder = store(tmp_path / "store")
    export_megatron(folder, tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a.bin: exists; fix: --out"):
        export_megatron(folder, tmp_path / "a")
    tokens = folder / "tokens_00002.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"tokens_00002.bin: its sha256 is not the manifest's"):
        export_megatron(folder, tmp_path / "b")
    assert not list(tmp_path.glob("*b.*"))


@given(st.lists(st.lists(st.integers(1, 99), max_size=4), max_size=12))
@settings(max_examples=30, deadline=None)
def test_an_exported_index_says_where_every_document_ends(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("export")
    export_megatron(store(folder / "store", shards=[[[*document, 0] for document in documents]]), folder / "a")
    index = open_index(folder / "a")
    lengths = [len(document) + 1 for document in documents]
    assert index.tokens == sum(lengths) and index.documents == len(documents)
    for first in range(len(documents)):
        found = [end for ends in index.document_ends(first) for end in ends.tolist()]
        assert found == np.cumsum(lengths).tolist()[first:]
        assert index.tokens_before(first) == sum(lengths[:first])


# --- import


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(["some text to train on, äöü"] * 3, out=tmp_path_factory.mktemp("bpe"), vocab_size=300)


def write_index(
    prefix: Path, sequences: list[list[int]], borders: list[int], kind: str = "int32", code: int = 4
) -> None:
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = np.concatenate([[0], lengths.cumsum(dtype=np.int64)[:-1]]).astype("<i8")[: len(lengths)]
    pointers *= np.dtype(kind).itemsize
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(sequence, kind).tobytes() for sequence in sequences))
    header = HEADER.pack(b"MMIDIDX\0\0", 1, code, len(sequences), len(borders))
    prefix.with_suffix(".idx").write_bytes(
        header + lengths.tobytes() + pointers.tobytes() + np.array(borders, "<i8").tobytes()
    )


def request(tmp_path: Path, tokenizer: Path, **changes: object) -> MegatronRequest:
    return MegatronRequest(tmp_path / "m", tokenizer, tmp_path / "store", "s", "general", 0.0, **changes)  # type: ignore[arg-type]


def test_megatrons_own_files_become_a_store(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos = encode.token_to_id("<|endoftext|>")
    texts = ["one text", "zwei äöü", "some text to train on"]
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(encode.get_vocab_size()))
    for text in texts:
        ids = [*encode.encode(text).ids, eos]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    facts = import_megatron(request(tmp_path, tokenizer))
    split = TokenStore.open(tmp_path / "store" / "train")
    split.verify()
    assert [encode.decode(document[:-1].tolist()) for document in split.documents()] == texts
    assert facts["splits"]["train"]["utf8_bytes"] == sum(len(text.encode()) for text in texts)
    assert facts["eos_added"] == facts["empty_documents"] == 0
    export_megatron(tmp_path / "store" / "train", tmp_path / "again")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"m{suffix}").read_bytes()


def test_documents_of_several_sequences_are_joined_and_get_their_eos(tmp_path: Path, tokenizer: Path) -> None:
    eos = 0
    write_index(tmp_path / "m", [[10, 11], [12], [], [13, eos], [eos]], [0, 2, 3, 4, 4, 5], "int64", 5)
    facts = import_megatron(request(tmp_path, tokenizer))
    assert documents_of(tmp_path / "store" / "train") == [[10, 11, 12, eos], [13, eos]]
    assert facts["eos_added"] == 1 and facts["empty_documents"] == 3


def test_the_heldout_split_follows_the_ids_alone(tmp_path: Path, tokenizer: Path) -> None:
    sequences = [[10 + i % 200, 11 + i // 200] for i in range(2000)]
    write_index(tmp_path / "m", sequences, list(range(2001)))
    import_megatron(MegatronRequest(tmp_path / "m", tokenizer, tmp_path / "a", "s", "general", 0.1))
    write_index(tmp_path / "m", sequences[::-1], list(range(2001)))
    import_megatron(MegatronRequest(tmp_path / "m", tokenizer, tmp_path / "b", "s", "general", 0.1))
    there, back = (sorted(documents_of(tmp_path / name / "heldout")) for name in "ab")
    assert there == back and 150 < len(there) < 250


def test_a_killed_import_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(tmp_path / "m", [[10 + i, 11, 0] for i in range(50)], list(range(51)))
    import_megatron(request(tmp_path, tokenizer, segment_tokens=20))
    expected = {file.name: file.read_bytes() for file in sorted((tmp_path / "store" / "train").iterdir())}
    (tmp_path / "store").rename(tmp_path / "first")
    counted = 0

    def failing(*arguments: object) -> Callable[[object], int]:
        def count(ids: object) -> int:
            nonlocal counted
            counted += 1
            if counted == 33:
                raise KeyboardInterrupt
            return 2

        return count

    monkeypatch.setattr(megatron_import, "byte_counter", failing)
    with pytest.raises(KeyboardInterrupt):
        import_megatron(request(tmp_path, tokenizer, segment_tokens=20))
    monkeypatch.undo()
    assert not (tmp_path / "store" / "train" / "manifest.json").exists()
    import_megatron(request(tmp_path, tokenizer, segment_tokens=20))
    import_megatron(request(tmp_path, tokenizer, segment_tokens=20))  # finished: nothing left to do
    found = {file.name: file.read_bytes() for file in sorted((tmp_path / "store" / "train").iterdir())}
    assert {name: raw for name, raw in found.items() if name != "manifest.json"} == {
        name: raw for name, raw in expected.items() if name != "manifest.json"
    }
    with pytest.raises(DataError, match="holds an import with another segment_tokens"):
        import_megatron(request(tmp_path, tokenizer, segment_tokens=21))


def test_bytes_are_counted_by_a_table_only_where_decoding_agrees(tmp_path: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    from data_tools.encoders import load_encoder

    encoder = load_encoder(tokenizer)
    texts = ["plain", "äöü 😀 \n\t", "<|endoftext|> in the middle"]
    documents = [encoder.encode_batch([text])[0] for text in texts]
    count = byte_counter(tokenizer, encoder.vocab_size, documents)
    assert [count(ids) for ids in documents] == [len(text.encode()) for text in texts]
    half = np.array(
        [Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id("Ã")]
    )  # the first byte of two: the table counts it, decoding makes it a mark of three bytes
    assert count(half) == 1 and byte_counter(tokenizer, encoder.vocab_size, [half])(half) == 3


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    write_index(tmp_path / "m", [[10], [11, 70_000]], [0, 1, 2])
    with pytest.raises(DataError, match=r"document 1 has ids from 11 to 70000.*fix: --tokenizer"):
        import_megatron(request(tmp_path, tokenizer))


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    write_index(tmp_path / "m", [[10]], [0, 1])
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes").touch()
    with pytest.raises(DataError, match=r"holds \['notes'\] but no import.json"):
        import_megatron(request(tmp_path, tokenizer))


def patched(offset: int, form: str, value: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:offset] + struct.pack(form, value) + raw[offset + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "sequences and 3 document borders make"),
        (lambda raw: raw[:20], "no Megatron index"),
        (lambda raw: b"x" + raw, "no Megatron index"),
        (lambda raw: raw + b"\0\0", "a multimodal index"),
        (patched(9, "<Q", 2), "version 2 cannot be read"),
        (patched(17, "<B", 6), "tokens of type float64 cannot be read"),
        (patched(17, "<B", 99), "tokens of type 99 cannot be read"),
        (patched(17, "<B", 5), "do not fit each other behind sequence 0"),
        (patched(18, "<Q", 1 << 60), "make"),
        (patched(34, "<i", -2), "do not fit each other"),
        (patched(38, "<i", 3), "m.bin: has 16 bytes, the index says 20"),
        (patched(42, "<q", 4), "do not fit each other"),
        (patched(58, "<q", 1), "documents span sequences 1 to 2"),
        (patched(66, "<q", 5), "document borders go back"),
    ],
)
def test_a_damaged_index_is_refused_with_what_is_wrong(
    tmp_path: Path, tokenizer: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    write_index(tmp_path / "m", [[10, 11], [12, 13]], [0, 1, 2])
    index = tmp_path / "m.idx"
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(DataError, match=message):
        import_megatron(request(tmp_path, tokenizer))


def test_both_verbs_say_what_they_made(workshop: Any, tokenizer: Path) -> None:
    write_index(workshop.root / "m", [[10, 11], [12, 0]], [0, 1, 2])
    target = ("--out", workshop.root / "store", "--source", "s", "--domain", "general", "--heldout-fraction", "0")
    done = workshop.cpt("data", "import-megatron", workshop.root / "m", "--tokenizer", tokenizer, *target, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["splits"]["train"]["documents"] == 2 and facts["eos_added"] == 1
    again = workshop.cpt("data", "import-megatron", workshop.root / "m", "--tokenizer", tokenizer, *target)
    assert again.code == 0 and "EOS added to 1 documents" in " ".join(again.out.split())
    command = ("data", "export-megatron", workshop.root / "store" / "train", "--out", workshop.root / "x" / "m")
    done = workshop.cpt(*command)
    assert done.code == 0 and "2 documents, 5 tokens as uint16" in " ".join(done.out.split())
    refused = workshop.cpt(*command, "--json")
    assert refused.code == 2 and "exists; fix: --out with another prefix" in " ".join(refused.err.split())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "x": 2}'])
def test_a_damaged_state_of_an_import_is_named(tmp_path: Path, tokenizer: Path, content: str) -> None:
    write_index(tmp_path / "m", [[10]], [0, 1])
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "import.json").write_text(content)
    with pytest.raises(DataError, match=r"import.json: damaged .*fix: delete the folder and run again"):
        import_megatron(request(tmp_path, tokenizer))


@pytest.mark.parametrize("prefix", [".", "..", "a/..", "/", ".bin"])
def test_a_folder_is_no_prefix(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(DataError, match="no prefix of file names; fix: end it with a name"):
        export_megatron(store(tmp_path / "s"), Path(prefix))
