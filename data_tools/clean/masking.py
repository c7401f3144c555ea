"""Masks personal data: e-mail addresses, public IPv4 addresses and, if asked, telephone numbers.

The patterns are datatrove's ``PIIFormatter``'s with two changes. The parts of an address have the lengths that
standards allow, so that a long line costs linear time; and an IP address ends at its digits, so that version numbers of
five parts stay whole. A kind of data always gets the same mask: what a document looks like does not depend on the ones
before it.
"""

import ipaddress
import re
import string
from collections.abc import Callable

from data_tools.clean.settings import Pii
from data_tools.corpus.document import Document, Reject, Step

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_LOCAL_PART = re.compile(rf"\b{_ATOM}(?:\.{_ATOM}){{0,8}}\Z")
_DOMAIN = re.compile(rf"(?:{_LABEL}\.){{1,8}}{_LABEL}")
_OCTET = "(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
_IP = re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\w)")
_PHONE = re.compile(
    r"(?<![\w+(./-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])"
)
_LOCAL_CHARACTERS = string.ascii_letters + string.digits + "!#$%&'*+/=?^_`{|}~-."
_EMAIL_REACH = 600  # characters before an @ within which its address starts, 9 atoms of 64 and dots


def mask_personal_data(settings: Pii) -> Step:
    """A step that changes the text and rejects nothing."""
    masks: list[Callable[[str], str]] = []
    if settings.emails:
        masks.append(lambda text: _mask_emails(text, settings.email_mask))
    if settings.ips:
        masks.append(lambda text: _IP.sub(lambda match: _public_ip_mask(match.group(), settings.ip_mask), text))
    if settings.phones:
        masks.append(lambda text: _PHONE.sub(lambda match: settings.phone_mask, text))

    def step(document: Document) -> Reject | None:
        for mask in masks:
            document.text = mask(document.text)
        return None

    return step


def _mask_emails(text: str, mask: str) -> str:
    """Looks to both sides of each @: most texts have none, and one pattern for both would try every word."""
    pieces: list[str] = []
    done = 0
    at = text.find("@")
    while at >= 0:
        before = text[max(done, at - _EMAIL_REACH) : at]
        start = at - len(before) + len(before.rstrip(_LOCAL_CHARACTERS))
        local, domain = _LOCAL_PART.search(text, start, at), _DOMAIN.match(text, at + 1)
        if local and domain:
            pieces += [text[done : local.start()], mask]
            done = domain.end()
        at = text.find("@", max(at + 1, done))
    return "".join(pieces) + text[done:] if pieces else text


def _public_ip_mask(found: str, mask: str) -> str:
    try:
        return mask if ipaddress.ip_address(found).is_global else found
    except ValueError:  # 010.1.1.1: no address
        return found
