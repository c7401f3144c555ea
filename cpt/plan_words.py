"""Where a plan differs from its wishes by more than rounding, in words: one line per source and reason.

Owns the warnings of ``cpt.plan``. Refuses to say one thing forty times: successive stages that share a reason are told
of together.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Given:
    """What one stage gives of one source, in rows: per block, wished and planned, and over the run up to here."""

    stage: int
    source: str
    wished: float
    planned: int
    block_rows: int
    epoch: int
    limit: float  # the cap
    needed: float  # so far, and wished from here on
    reached: float  # so far, this stage with it


@dataclass(frozen=True)
class NewPass:
    """A stage whose rows have another length than those before it: the epochs seen then of what it reads again."""

    stage: int
    seq_len: int
    seen: Mapping[str, float]


def new_passes_in_words(passes: Iterable[NewPass]) -> Iterator[str]:
    for one in passes:
        if one.seen:
            seen = ", ".join(f"{name} {epochs:.2f}" for name, epochs in one.seen.items())
            yield (
                f"stage {one.stage} has rows of {one.seq_len} tokens: its sources are packed anew and shuffled in "
                f"another order, so documents that were read before it may come again before all have been read "
                f"(epochs until then: {seen}; caps count them)"
            )


def doubts_in_words(given: Sequence[Given]) -> Iterator[str]:
    """``stages 3 to 9, source 'med': wished share 0.7 to 0.8, planned 0.6: ...`` for every wish that was changed."""
    kinds: dict[tuple[str, str], list[list[Given]]] = {}
    for one in given:
        kind = _kind(one)
        if kind is None:
            continue
        runs = kinds.setdefault((one.source, kind), [])
        if runs and runs[-1][-1].stage == one.stage - 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    told = [(run, kind) for (_, kind), runs in kinds.items() for run in runs]
    for run, kind in sorted(told, key=lambda each: each[0][0].stage):
        first, last = run[0], run[-1]
        stages = f"stage {first.stage}" if len(run) == 1 else f"stages {first.stage} to {last.stage}"
        wished = _range([one.wished / one.block_rows for one in run])
        planned = _range([one.planned / one.block_rows for one in run])
        reason = _reason(kind, last if kind == "takes more" else first)
        yield f"{stages}, source {first.source!r}: wished share {wished}, planned {planned}: {reason}"


def _kind(one: Given) -> str | None:
    if one.planned == 0 < one.wished:
        return "left out"
    if one.planned <= one.wished - 1:
        return "capped"
    if one.planned >= one.wished + 1:
        return "takes more"
    return "rounded up" if one.planned == 1 and one.wished < 0.5 else None


def _reason(kind: str, one: Given) -> str:
    cap, block = f"max_epochs {one.limit / one.epoch:g}", f"one row in each block of {one.block_rows}"
    return {
        "left out": f"{block} would exceed {cap}; it is left out",
        "capped": f"the wish is {one.needed / one.epoch:.2f} epochs, capped at {cap}",
        "takes more": f"it takes what capped sources cannot give and reaches {one.reached / one.epoch:.2f} epochs",
        "rounded up": f"at least {block}",
    }[kind]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"
