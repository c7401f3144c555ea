"""The page and the terminal: nothing that a document says is markup or a control sequence; the page is complete."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.look.drawings import histogram, rank_curve, short
from data_tools.look.inspection import inspect_sources
from data_tools.look.lengths import doubling_bins
from data_tools.look.page import render_page, write_page
from data_tools.look.store_facts import Look
from data_tools.look.terminal import one_line, render_inspection, visible
from data_tools.store_builder import StoreRequest, build_store
from data_tools.train_tokenizer import train_bpe

ATTACK = '</pre></title></style><script>alert("x")</script><img src=x onerror=alert(1)> {{ 7 * 7 }} [red]b[/red] \x1b[2J\u202e'


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    """A store and raw files, each full of hostile text: also in a field's name and value, and in a file name."""
    root = tmp_path_factory.mktemp("look")
    file = root / "<script>alert(2)<.jsonl"
    records = [{"text": f"{ATTACK}\n{ATTACK}\nnumber {n}", "<b>field</b>": "<u>value</u>"} for n in range(30)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    train_bpe([ATTACK], out=root / "bpe", vocab_size=400)
    build_store(StoreRequest((str(file),), root / "bpe", root / "store", "<i>s</i>", "d", 0.0))
    return inspect_sources([root / "store" / "train", file], Look(tokenizer=root / "bpe", seq_len=64))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_hostile_text_stays_text_on_the_page(inspection: dict[str, list[dict[str, object]]]) -> None:
    page = render_page(inspection)
    parser = _Tags()
    parser.feed(page)
    assert not parser.tags & {"script", "img", "u", "iframe", "link"}
    assert not {name for name in parser.attributes if name.startswith("on") or name in ("src", "href")}
    text = "".join(parser.text)
    assert 'alert("x")' in text and "{{ 7 * 7 }}" in text and "<u>value</u>" in text
    assert "\x1b" not in page and "\u202e" not in page and "<U+202E>" in text


def test_the_page_needs_nothing_else_and_knows_both_themes(inspection: dict[str, list[dict[str, object]]]) -> None:
    page = render_page(inspection)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert page.count("<svg") == 3 and "EOS" in page and "Repeated lines" in page


def test_the_page_is_written_into_a_new_folder(inspection: dict[str, list[dict[str, object]]], tmp_path: Path) -> None:
    write_page(inspection, tmp_path / "new" / "look.html")
    assert (tmp_path / "new" / "look.html").read_text().startswith("<!doctype html>")


def test_hostile_text_moves_no_cursor(inspection: dict[str, list[dict[str, object]]]) -> None:
    out = io.StringIO()
    Console(width=120, file=out, force_terminal=False).print(render_inspection(inspection))
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue()
    assert "[red]b[/red] ␛[2J" in out.getvalue()


def test_control_characters_have_pictures() -> None:
    assert visible("a\tb\nc\x00\x07\x9b\ud800") == "a\tb\nc␀␇<U+009B><U+D800>"
    assert one_line("a\tb\nc") == "a⇥b⏎c"


def test_bins_double_and_hold_every_document() -> None:
    import numpy as np

    bins = doubling_bins(np.array([0, 1, 2, 3, 4, 1023, 1024]))
    assert [(entry["from"], entry["documents"]) for entry in bins if entry["documents"]] == [
        (1, 2), (2, 2), (4, 1), (512, 1), (1024, 1)
    ]  # fmt: skip
    assert len(bins) == 11 and doubling_bins(np.array([], int)) == []


def test_pictures_of_little_are_pictures_too() -> None:
    assert "<rect" in histogram([{"from": 1, "below": 2, "documents": 1}], "red")
    assert "<polyline" in rank_curve([("red", [[1, 1]])])
    assert (short(2048, 1024), short(999), short(12345)) == ("2k", "999", "12.3k")
