"""The embedded corpus: prose without code, code without prose, the same bytes each time, and a clear no where there is too little."""

import ast
from pathlib import Path

import orjson
import pytest
import zstandard

from cpt.rundir import DataError
from data_tools.embedded import Roots, write_embedded_corpus
from data_tools.prose import is_prose, paragraph_key, prose_paragraphs
from data_tools.python_source import take_apart

SOURCE = '''\
"""Tools for the keeping of cats, which are not always easy to keep.

The cat is fed `twice` a day, and :func:`feed` is the way in which that is done here.

Parameters
----------
cat : Cat
    The cat that should be fed by the one who is on duty today.
food : str, optional

>>> feed(cat)  # and this example is not any kind of English prose at all
"""

import os  # the comment


def feed(cat, food="#fish"):
    """Return nothing."""
    # a comment line
    name = f"{cat}#1"  # another

    return name + """
# not a comment
"""


def nap(): "on one line"


class Cat:
    """Only a docstring, of which nothing is left but the word pass in this body."""
'''
CODE = '''\
import os


def feed(cat, food="#fish"):
    name = f"{cat}#1"

    return name + """
# not a comment
"""


def nap(): pass


class Cat:
    pass
'''


def test_code_keeps_strings_and_loses_comments_and_docstrings() -> None:
    parts = take_apart(SOURCE)
    assert parts.code == CODE
    assert [text.split("\n")[0][:14] for text in parts.docstrings] == [
        "Tools for the ", "Return nothing", "on one line", "Only a docstri",
    ]  # fmt: skip
    ast.parse(parts.code)


def test_a_file_that_is_mostly_a_table_gives_no_code() -> None:
    assert take_apart("table = {\n" + "\n".join(f"    0x{i:04x}: {i}," for i in range(300)) + "\n}\n").code == ""
    assert take_apart("text = '''" + "words in a literal " * 50 + "'''\n").code == ""


def test_paragraphs_of_prose_are_kept_and_marks_are_taken_off() -> None:
    assert list(prose_paragraphs(take_apart(SOURCE).docstrings[0])) == [
        "Tools for the keeping of cats, which are not always easy to keep.",
        "The cat is fed twice a day, and feed is the way in which that is done here.",
        "The cat that should be fed by the one who is on duty today.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Return the value.",
        "x = self.cache[key] if the key is in self.cache else self.load(key, of=cache).",
        "alpha beta gamma delta epsilon zeta eta theta iota.",
        "this sentence of the text has no end and so it is not taken as one",
    ],
)
def test_fragments_and_code_are_no_prose(text: str) -> None:
    assert not is_prose(text)


def test_a_template_filled_with_names_is_one_paragraph() -> None:
    first = "Instantiating a configuration with the defaults will yield a similar configuration to that of BERT."
    assert paragraph_key(first) == paragraph_key(first.replace("BERT", "GPT-2 and T5"))


def make_roots(root: Path) -> Roots:
    (root / "lib" / "pydoc_data").mkdir(parents=True)
    (root / "lib" / "test").mkdir()
    (root / "site" / "numpy").mkdir(parents=True)
    topic = "The assert statement is a way to put checks into a program, and it is used for that alone."
    (root / "lib" / "pydoc_data" / "topics.py").write_text(
        f"topics = {{'assert': {(topic + chr(10) * 2 + topic + ' ' + topic)!r}}}"
    )
    for name in ("lib/cats.py", "lib/copy_of_cats.py", "lib/test/test_cats.py", "site/numpy/cats.py"):
        total = " + ".join(["first"] * 20)
        (root / name).write_text(f"{SOURCE}\n\ndef {Path(name).stem}_{name[0]}(first):\n    return {total}\n")
    (root / "lib" / "copy_of_cats.py").write_bytes((root / "lib" / "cats.py").read_bytes())
    (root / "lib" / "broken.py").write_text("def (:\n")
    return Roots(root / "lib", root / "site")


def read_corpus(file: Path) -> dict[str, str]:
    lines = zstandard.ZstdDecompressor().decompress(file.read_bytes()).splitlines()
    return {record["id"]: record["text"] for record in map(orjson.loads, lines)}


def test_documents_are_unique_and_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    roots = make_roots(tmp_path)
    first = write_embedded_corpus(tmp_path / "one", roots=roots, workers=1, min_bytes=(100, 100))
    second = write_embedded_corpus(tmp_path / "two", roots=roots, workers=2, min_bytes=(100, 100))
    assert first.general.read_bytes() == second.general.read_bytes()
    assert first.domain.read_bytes() == second.domain.read_bytes()
    assert list(read_corpus(first.domain)) == ["cats.py#0", "test/test_cats.py#0", "numpy/cats.py#0"]
    assert "not always easy" not in "".join(read_corpus(first.domain).values())
    # the second cats.py repeats every paragraph of the first
    assert list(read_corpus(first.general)) == ["cats.py#0"]
    assert first.general_bytes == sum(len(text.encode()) for text in read_corpus(first.general).values())


def test_an_installation_with_too_little_text_is_refused_with_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"embedded general corpus has only \d+ bytes of at least 4,000,000; documents found"
    ):
        write_embedded_corpus(tmp_path / "out", roots=make_roots(tmp_path), workers=1)
    assert not list((tmp_path / "out").iterdir())
