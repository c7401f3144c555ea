"""Repairs text: mojibake, control characters, lone surrogates, HTML escapes, Unicode normal form, with `ftfy`.

Plain ASCII without control characters and escapes, most of an English corpus, passes unchanged without being looked at
by `ftfy` (a test proves it would not change it).
"""

import re

from data_tools.clean.settings import FixUnicode
from data_tools.corpus.document import Document, Reject, Step

# What ftfy may change in ASCII: control characters but tab and line feed, an HTML escape
_SUSPECT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]|&#?\w{1,24};|&[A-Z]")


def fix_unicode(settings: FixUnicode) -> Step:
    """A step that changes the text; rejects what is empty then."""
    try:
        import ftfy
    except ModuleNotFoundError:
        raise RuntimeError("fix_unicode needs ftfy; fix: pip install 'cpt[data]'") from None
    config = ftfy.TextFixerConfig(
        unescape_html="auto" if settings.unescape_html else False,
        uncurl_quotes=settings.straighten_quotes,
        fix_latin_ligatures=False,  # they and wide characters are the normal form's: NFKC folds them, NFC keeps them
        fix_character_width=False,
        normalization=settings.form,
        explain=False,
    )

    def step(document: Document) -> Reject | None:
        text = document.text
        if not text.isascii() or _SUSPECT.search(text):
            document.text = ftfy.fix_text(text, config)
        return None if document.text.strip() else Reject("fix_unicode.empty")

    return step
