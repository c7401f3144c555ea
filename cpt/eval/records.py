"""One evaluation of one model: loss, bits per byte and perplexity per held-out source, and the file it is kept in. No
torch.

``evals/step_00000500.json`` is strict JSON: a loss that is not finite is null and ``errors`` names its source;
nothing is left out. Units: loss in nats per counted token; bpb in bits per UTF-8 byte of the text; ppl = exp(loss).
Refuses files of another shape, with their name.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from cpt.rundir import DataError, write_atomic


@dataclass(frozen=True)
class SourceEval:
    """One held-out source. ``tokens`` are counted tokens, ``documents`` those that begin in the evaluated rows;
    ``stderr`` of the loss in nats per token, clustered by document (:func:`cpt.eval.document_pieces.ratio_stderr`),
    None where fewer than two documents were measured or an older version wrote the file.
    """

    group: str
    loss: float | None
    bpb: float | None
    ppl: float | None
    tokens: int
    documents: int
    stderr: float | None = None


@dataclass(frozen=True)
class GroupEval:
    """Token-weighted mean over the sources of a group; None where one of its sources has no finite loss."""

    loss: float | None
    bpb: float | None
    ppl: float | None
    tokens: int


@dataclass(frozen=True)
class EvalRecord:
    """Everything measured at one step; step 0 is the base model, before any training."""

    step: int
    tokens_seen: int
    sources: Mapping[str, SourceEval]
    groups: Mapping[str, GroupEval]
    errors: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Self:
        """Raises DataError: not JSON, or other keys than this version writes."""
        try:
            raw: dict[str, Any] = json.loads(text)
            return cls(
                step=int(raw["step"]),
                tokens_seen=int(raw["tokens_seen"]),
                sources={name: SourceEval(**_own(SourceEval, value)) for name, value in raw["sources"].items()},
                groups={name: GroupEval(**_own(GroupEval, value)) for name, value in raw["groups"].items()},
                errors=tuple(raw.get("errors", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: not an evaluation record ({error!r}); delete it and run `cpt eval` again"
            ) from None


def _own(kind: type[SourceEval] | type[GroupEval], value: Mapping[str, Any]) -> dict[str, Any]:
    optional = {"stderr": value.get("stderr")}  # older files have none
    return {entry.name: (optional | dict(value))[entry.name] for entry in fields(kind)}


def bits_per_byte(loss: float | None, tokens_per_byte: float) -> float | None:
    """Nats per token -> bits per byte of text: ``loss * tokens_per_byte / ln 2``."""
    return None if loss is None else loss * tokens_per_byte / math.log(2.0)


def perplexity(loss: float | None) -> float | None:
    """exp(loss); None where that is beyond floating point (loss above 709)."""
    return None if loss is None or loss > 709.0 else math.exp(loss)


def aggregate(sources: Mapping[str, SourceEval]) -> dict[str, GroupEval]:
    """Groups from sources: losses weighted by counted tokens, bits per byte by bytes (total bits over total bytes)."""
    groups: dict[str, GroupEval] = {}
    for group in sorted({source.group for source in sources.values()}):
        groups[group] = _group([source for source in sources.values() if source.group == group])
    return groups


def _group(members: Sequence[SourceEval]) -> GroupEval:
    tokens = sum(member.tokens for member in members)
    nats = num_bytes = 0.0
    for member in members:
        if member.loss is None:
            return GroupEval(loss=None, bpb=None, ppl=None, tokens=tokens)
        nats += member.loss * member.tokens
        # A source learned to loss 0 says nothing about its bytes; it adds no bits either.
        num_bytes += member.loss * member.tokens / (member.bpb * math.log(2.0)) if member.bpb else 0.0
    loss = nats / tokens
    bpb = nats / math.log(2.0) / num_bytes if num_bytes else None
    return GroupEval(loss=loss, bpb=bpb, ppl=perplexity(loss), tokens=tokens)


def write_eval(path: Path, record: EvalRecord) -> None:
    """Write one record atomically, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, record.to_json())


def read_eval(path: Path) -> EvalRecord:
    """Raises DataError: the file is missing, unreadable or of another shape."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run `cpt eval` to write it") from None
    return EvalRecord.from_json(text, path)


def read_evals(folder: Path) -> list[EvalRecord]:
    """All ``step_*.json`` of a folder by step; an absent folder holds none."""
    return sorted((read_eval(path) for path in folder.glob("step_*.json")), key=lambda record: record.step)
