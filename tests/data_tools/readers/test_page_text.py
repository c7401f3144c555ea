"""Visible text of pages, and no page whose reading takes longer than its length."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.readers.page_text import html_text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<h1>A <b>bold</b>&amp; title</h1><p>one\nline<br>two</p>", "A bold& title\none line\ntwo"),
        ("<ul><li>x<li>y</ul>", "x\ny"),
        ("<pre>a\n b</pre>c\nd", "a\nb\nc d"),
        ("<head><title>no</title><style>p {}</style></head><body>yes", "yes"),
        ("<head><p>never closed<body>text", "text"),
        ('a<script>if (a < b) { x("</p>") }</script>b', "ab"),
        ("a<SCRIPT>x</Script >b", "ab"),
        ("a<script src=x />b</script>c", "ac"),
        ("a<svg><svg></svg><text>no</text></svg>b<svg/>c", "abc"),
        ("a<!-- <p>no</p> -->b<!doctype html>c<?xml ?>d", "ab\nc\nd"),
        ('a<a title="1 > 0" href=x>b</a>c', "abc"),
        ("1 < 2 &lt; 3 <3 a<", "1 < 2 < 3 <3 a<"),
        ("a<p never closed", "a"),
        ("a<!-- never closed", "a"),
        ("&#xD800;&#0;&nosuch;", "\ufffd\ufffd&nosuch;"),
        ("&#" + "9" * 9000 + ";", "&#" + "9" * 9000 + ";"),
        ("", ""),
    ],
)
def test_visible_text_stays_and_blocks_end_lines(page: str, text: str) -> None:
    assert html_text(page).replace("\n\n", "\n") == text


PIECES = (
    "<!--",
    "<",
    "<a ",
    "</",
    "<![CDATA[",
    "<a b='",
    '<a b=">',
    "<script>",
    "</script>",
    "<svg>",
    "</svg>",
    "&",
    "&#9",
    "<p>",
    "<?",
    "'>",
)


@pytest.mark.parametrize("piece", PIECES)
def test_a_hostile_page_takes_no_longer_than_its_length(piece: str) -> None:
    start = time.process_time()
    html_text(piece * (400_000 // len(piece)))
    assert time.process_time() - start < 2  # the standard library's parser: minutes for some


@given(st.lists(st.sampled_from([*PIECES, "text", " ", "\n", "<body>", "<head>", "<pre>", "-->", "/>", "é"])))
def test_any_mixture_gives_text_that_can_be_stored(pieces: list[str]) -> None:
    lines = html_text("".join(pieces)).encode().decode().split("\n")
    assert all(line == line.strip() for line in lines)
