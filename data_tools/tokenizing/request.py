"""What a token store is asked to be, and the identity that tells one request from another."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpt.rundir import DataError
from data_tools.encoders import AUTO_BOS, Encoder
from data_tools.sources import Input, ReadOptions

SPLITS = ("train", "heldout")
BadRecords = Literal["fail", "reject"]


@dataclass(frozen=True)
class StoreRequest:
    """What ``cpt data tokenize`` asks for; every field but ``workers`` and ``task`` decides the bytes of the store.

    ``task``: (i, n) builds part i of n, which ``merge`` makes one store of; (0, 1) builds the store itself.
    """

    inputs: tuple[str, ...]
    tokenizer: Path
    out: Path
    source: str
    domain: str
    heldout_fraction: float = 0.01
    eos_token: str | None = None
    bos_token: str = AUTO_BOS
    read: ReadOptions = field(default_factory=ReadOptions)
    bad_records: BadRecords = "fail"
    segment_bytes: int = 128 << 20
    workers: int = 2
    task: tuple[int, int] = (0, 1)

    @property
    def is_part(self) -> bool:
        return self.task[1] > 1

    def check(self) -> None:
        """Raises DataError naming every field that is wrong."""
        rules = (
            (0 <= self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "0 <= x < 1"),
            (self.workers >= 1, "workers", self.workers, "at least 1"),
            (self.segment_bytes >= 1, "segment_bytes", self.segment_bytes, "at least 1"),
            (bool(self.source), "source", self.source, "a name"),
            (bool(self.domain), "domain", self.domain, "a label such as general or medical"),
            (self.bad_records in ("fail", "reject"), "bad_records", self.bad_records, "fail or reject"),
            (0 <= self.task[0] < self.task[1], "task", self.task, "i of n with 0 <= i < n"),
        )
        problems = [f"{name} is {value!r}, must be {rule}" for good, name, value, rule in rules if not good]
        if problems:
            raise DataError("; ".join(problems))


def identity_of(request: StoreRequest, inputs: Sequence[Input], encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the bytes of the store; files count with their sizes, so a changed one is noticed."""
    return {
        "inputs": [[entry.name, entry.size_bytes] for entry in inputs],
        "text_key": request.read.text_key,
        "txt_documents": request.read.txt_documents,
        "bad_records": request.bad_records,
        "tokenizer": encoder.facts.fingerprint,
        "eos_id": encoder.eos_id,
        "bos_id": encoder.bos_id,
        "source": request.source,
        "domain": request.domain,
        "heldout_fraction": request.heldout_fraction,
        "segment_bytes": request.segment_bytes,
    }
