"""Masks: what is personal goes, what only looks like it stays, in linear time."""

import random
import time

import pytest

from data_tools.clean.masking import mask_personal_data
from data_tools.clean.settings import Pii
from data_tools.corpus.document import Document

ALL = Pii(email_mask="MAIL", ip_mask="IP", phone_mask="PHONE", phones=True)


def masked(text: str, settings: Pii = ALL) -> str:
    document = Document(text)
    assert mask_personal_data(settings)(document) is None
    return document.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+x@mail.example.co.uk, or ü@b.de.", "Write to MAIL, or ü@b.de."),
        ("a@b.c@d.org and @handle and x@y", "MAIL@d.org and @handle and x@y"),
        ("<first@one.org>;second@two.org", "<MAIL>;MAIL"),
        ("8.8.8.8 but 192.168.0.1, 127.0.0.1 and 300.1.1.1", "IP but 192.168.0.1, 127.0.0.1 and 300.1.1.1"),
        ("version 1.2.3.4.5 of 2.3.4 and v8.8.8.8", "version 1.2.3.4.5 of 2.3.4 and v8.8.8.8"),
        ("It was 8.8.8.8.", "It was IP."),
        ("Call +49 30 1234567 or (202) 555-0123 or 202-555-0123.", "Call PHONE or PHONE or PHONE."),
        (
            "2019-2020, 10.1000/182, 3-4-5, ISBN 978-3-16-148410-0",
            "2019-2020, 10.1000/182, 3-4-5, ISBN 978-3-16-148410-0",
        ),
    ],
)
def test_personal_data_is_masked_and_nothing_else(text: str, expected: str) -> None:
    assert masked(text) == expected


def test_each_kind_can_be_switched_off() -> None:
    text = "x@y.org 8.8.8.8 +49 30 1234567"
    assert masked(text, Pii(emails=False, ips=False)) == text
    assert masked(text, Pii(ips=False)) == "email@example.com 8.8.8.8 +49 30 1234567"


def test_emails_are_those_of_datatroves_formatter() -> None:
    from datatrove.pipeline.formatters import PIIFormatter

    theirs = PIIFormatter(email_replacement="MAIL", remove_ips=False)
    rng = random.Random(0)
    alphabet = ["a", "Bc", ".", "@", "-", "_", " ", "d1.org", "\n", "é", "!", "x@y.de", ","]
    for _ in range(5000):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 25)))
        assert masked(text, Pii(ips=False, email_mask="MAIL")) == theirs.format(text), text


@pytest.mark.parametrize(
    "text", ["a" * 500_000, "a.b-" * 100_000, "@" * 100_000, "a@" * 50_000, "1.2." * 100_000, "1 2 3 " * 50_000]
)
def test_a_long_line_costs_linear_time(text: str) -> None:
    start = time.perf_counter()
    masked(text)
    assert time.perf_counter() - start < 5  # quadratic: minutes
