"""extension.json: comes back as written, and is refused where it cannot be true."""

import json
from pathlib import Path

import pytest

from cpt.data.vocabulary import NAME, VocabularyExtension, read_extension, write_extension
from cpt.rundir import DataError

EXTENSION = VocabularyExtension("base", "ab" * 32, "cd" * 32, 10, ((1, 2), (3, 4, 5)))


def test_it_comes_back_from_the_folder_or_a_file_in_it(tmp_path: Path) -> None:
    write_extension(tmp_path, EXTENSION)
    assert read_extension(tmp_path) == EXTENSION == read_extension(tmp_path / "tokenizer.json")
    assert EXTENSION.vocab_size == 12


def test_a_tokenizer_without_it_was_not_extended(tmp_path: Path) -> None:
    assert read_extension(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 9}, "another version"),
        ({"subtokens": [[1, 10]]}, "ids that the base has not"),
        ({"subtokens": [[]]}, "ids that the base has not"),
        ({"subtokens": 3}, "cannot be read"),
        ({"more": 1}, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_true_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    write_extension(tmp_path, EXTENSION)
    content = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match=f"{NAME}.*{said}.*fix"):
        read_extension(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff\xfe", b'{"format": 1'])
def test_a_damaged_file_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / NAME).write_bytes(raw)
    with pytest.raises(DataError, match="cannot be read"):
        read_extension(tmp_path)
