"""One evaluation of one model: loss, bits per byte and perplexity per held-out source, and the file it is kept in. No
torch.

``evals/step_00000500.json`` is strict JSON: a loss that is not finite is null and ``errors`` names its source;
nothing is left out. Units: loss in nats per counted token; bpb in bits per UTF-8 byte of the text; ppl = exp(loss).
Refuses files of another shape, or of another step than their name says.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter, ValidationError

from cpt.rundir import DataError, step_of, write_atomic


def _finite(value: float | None) -> float | None:
    """NaN and infinity, which JSON of other tools may have, are unknown."""
    return value if value is not None and math.isfinite(value) else None


Number = Annotated[float | None, AfterValidator(_finite)]
AGAIN = "delete it and run `cpt eval` again"


@dataclass(frozen=True)
class SourceEval:
    """One held-out source. ``tokens`` are counted tokens, ``documents`` those that begin in the evaluated rows;
    ``stderr`` of the loss in nats per token, clustered by document (:func:`cpt.eval.document_pieces.ratio_stderr`),
    None where fewer than two documents were measured or an older version wrote the file.
    """

    group: str
    loss: Number
    bpb: Number
    ppl: Number
    tokens: int
    documents: int
    stderr: Number = None


@dataclass(frozen=True)
class GroupEval:
    """Token-weighted mean over the sources of a group; None where one of its sources has no finite loss."""

    loss: Number
    bpb: Number
    ppl: Number
    tokens: int


@dataclass(frozen=True)
class EvalRecord:
    """Everything measured at one step; step 0 is the base model, before any training."""

    step: int
    tokens_seen: int
    sources: Mapping[str, SourceEval]
    groups: Mapping[str, GroupEval]
    errors: tuple[str, ...] = ()


_RECORD = TypeAdapter(EvalRecord)


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
    write_atomic(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")


def read_eval(path: Path) -> EvalRecord:
    """Raises DataError: the file is missing, damaged, of another shape or of another step than its name says."""
    try:
        record = _RECORD.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); run `cpt eval` to write it") from None
    except ValidationError as error:
        raise DataError(f"{path}: not an evaluation record ({_fault(error)}); {AGAIN}") from None
    if step_of(path) not in (None, record.step):
        raise DataError(f"{path}: holds the evaluation of step {record.step}; {AGAIN}")
    return record


def _fault(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    fault = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, fault["loc"]))
    return f"{field + ': ' if field else ''}{fault['msg']:.200}"


def read_evals(folder: Path) -> list[EvalRecord]:
    """All ``step_*.json`` of a folder by step; an absent folder holds none."""
    return sorted((read_eval(path) for path in folder.glob("step_*.json")), key=lambda record: record.step)
