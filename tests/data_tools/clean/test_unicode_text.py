"""Repairs of text, and that the ASCII short cut changes nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.clean.settings import FixUnicode
from data_tools.clean.unicode_text import fix_unicode
from data_tools.corpus.document import Document


def fixed(text: str, told: FixUnicode | None = None) -> str:
    document = Document(text)
    reject = fix_unicode(told or FixUnicode())(document)
    return "rejected: " + reject.reason if reject else document.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Mona Lisa doesnÃƒÂ¢Ã¢â€šÂ¬Ã¢â€žÂ¢t have eyebrows.", "The Mona Lisa doesn\u2019t have eyebrows."),
        ("Stra\u00dfe e\u0301", "Straße é"),
        ("a\x00b\x01c\ufeff", "abc"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("fish &amp; chips", "fish & chips"),
        ("<b>fish &amp; chips</b>", "<b>fish &amp; chips</b>"),
        ("lone \ud800 half", "lone \ufffd half"),
        ("“curly” ﬁsh\uff01", "“curly” ﬁsh\uff01"),
        (" \x00\n", "rejected: fix_unicode.empty"),
        ("日本語。", "日本語。"),
    ],
)
def test_damage_is_repaired_and_style_is_kept(text: str, expected: str) -> None:
    assert fixed(text) == expected


def test_nfkc_folds_width_and_ligatures_and_quotes_are_straightened_on_demand() -> None:
    assert fixed("ﬁsh\uff01", FixUnicode(form="NFKC")) == "fish!"
    assert fixed("“a”", FixUnicode(straighten_quotes=True)) == '"a"'
    assert fixed("fish &amp; chips", FixUnicode(unescape_html=False)) == "fish &amp; chips"


@given(st.text(st.characters(max_codepoint=127)) | st.text(st.sampled_from("a &;#x27amplt<>\r\n\x1b[0m\t")))
@settings(max_examples=500, deadline=None)
def test_the_short_cut_for_ascii_changes_nothing(text: str) -> None:
    import ftfy

    told = ftfy.TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
    )
    expected = ftfy.fix_text(text, told)
    assert fixed(text) == (expected if expected.strip() else "rejected: fix_unicode.empty")
