"""A document on its way through the corpus tools, and why one leaves the stream.

A *step* is what a tool does to one document: it may change ``document.text``, and returns a ``Reject`` with a named
reason where the document is to go, None where it stays. Readers make documents, stages run steps, writers take what is
kept and what is not; none knows the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Document:
    """``fields``: all other fields of the record, written back as they were; ``origin``: ``file:record`` for people."""

    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """``reason``: what counts are kept by, ``rule`` or ``rule.detail``; ``detail``: the value that was measured."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is no document: ``raw`` are its bytes as read, ``reason`` starts with ``bad_record.``."""

    raw: bytes
    reason: str
    detail: str
    origin: str


Step = Callable[[Document], Reject | None]
