"""Mixture schedules: from what a run file says to the stages of a plan. Pure functions, no files.

Owns one function per schedule and the table that names them. A stage is a stretch of steps with constant shares, which
is all that the plan and the sampler know: a line becomes so many stages that no share is ever further than
``SHARE_ERROR`` from it, but none shorter than a step or than ``MIN_STAGE_ROWS`` rows, where a row more or less would
matter more than that. Refuses shares that cannot be: a factor that lifts a source over the whole, weights that are
all 0.

Worked example: 100 steps of 200 rows, ``share_general`` in a line from 0.5 to 0.1. In 2.5 steps it moves by 2 * 0.005,
so there are 50 stages of 2 steps, each with the line's value in its middle: 0.496 for steps 0 and 1. Their mean over
all rows is the line's mean, 0.3.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from cpt.mix_fields import DEFAULT_REPLAY_SHARE, LinearMix, MixPoint, StageSection, TemperatureMix, UpsampleEndMix
from cpt.plan_parts import PlanSource, StageWish, wished_shares
from cpt.quotas import whole_steps
from cpt.rundir import DataError

SHARE_ERROR = 0.005
MIN_STAGE_ROWS = 100


@dataclass(frozen=True)
class MixRequest:
    """What all schedules are told: the sources, the length of the run, and the mixture where nothing else is said.

    ``share_general`` None means the default: a quarter if there are both kinds of source.
    """

    sources: tuple[PlanSource, ...]
    tokens: int
    step_rows: int
    step_tokens: int
    share_general: float | None
    weights: Mapping[str, float]

    @property
    def num_steps(self) -> int:
        return self.tokens // self.step_tokens

    def usual(self) -> StageWish:
        """The whole run where no schedule says otherwise."""
        groups = {source.group for source in self.sources}
        default = DEFAULT_REPLAY_SHARE if len(groups) == 2 else float("general" in groups)
        share = default if self.share_general is None else self.share_general
        return StageWish(self.tokens, share, dict(self.weights))

    def usual_shares(self) -> list[float]:
        return wished_shares(self.sources, self.usual())


def constant(_: object, request: MixRequest) -> list[StageWish]:
    return [request.usual()]


def steps(stages: Sequence[StageSection], request: MixRequest) -> list[StageWish]:
    """``data.stages``: each with its own tokens, shares and row length."""
    return [replace(_stated(stage, request, stage.tokens), own_tokens=True, seq_len=stage.seq_len) for stage in stages]


def linear(mix: LinearMix, request: MixRequest) -> list[StageWish]:
    """Each point is moved to the nearest whole step; a stage has the line's value in its middle, so its mean too."""
    wished = [_stated(point, request, request.tokens) for point in mix.points]
    places = [min(request.num_steps, round(point.tokens / request.step_tokens)) for point in mix.points]
    points = [(step, wished_shares(request.sources, wish)) for step, wish in zip(places, wished, strict=True)]
    before, after = (0, points[0][1]), (request.num_steps, points[-1][1])
    wishes = []
    for (start, here), (end, there) in pairwise([before, *points, after]):
        change = max(abs(a - b) for a, b in zip(here, there, strict=True))
        for first, last in _pieces(start, end, change, request.step_rows):
            place = ((first + last) / 2 - start) / (end - start)
            middle = [a + (b - a) * place for a, b in zip(here, there, strict=True)]
            wishes.append(_wish(request, middle, last - first))
    return wishes


def temperature(mix: TemperatureMix, request: MixRequest) -> list[StageWish]:
    hot = _tempered(mix.tau, mix, request)
    if mix.final_tau is None:
        return [_wish(request, hot, request.num_steps)]
    return _two_parts(request, hot, _tempered(mix.final_tau, mix, request), mix.final_fraction)


def upsample_end(mix: UpsampleEndMix, request: MixRequest) -> list[StageWish]:
    before = request.usual_shares()
    after = [0.0] * len(before)
    for source, share in zip(request.sources, before, strict=True):
        if source.name in mix.factors and not share:
            raise DataError(
                f"data.mix.factors names {source.name}, but {source.name} has no share to multiply; give it a weight, "
                "or use data.stages or data.mix.name=linear, which state shares"
            )
    for members in _scopes(mix.scope, request.sources):
        whole = sum(before[i] for i in members)
        raised = {i: before[i] * mix.factors[name] for i in members if (name := request.sources[i].name) in mix.factors}
        left, others = whole - sum(raised.values()), whole - sum(before[i] for i in raised)
        if left < -1e-9 or (others <= 1e-9 < left):
            names = ", ".join(request.sources[i].name for i in raised)
            place, way_out = ("whole batch", "") if mix.scope == "all" else ("group", ", or set data.mix.scope=all")
            fix = f"lower data.mix.factors{way_out}"
            if left > 0:
                fix = f"no other source there can take the rest: leave {names} out of data.mix.factors{way_out}"
            raise DataError(
                f"data.mix.factors gives {names} a share of {sum(raised.values()):.4g} at the end, but the "
                f"{place} has {whole:.4g} to share; {fix}"
            )
        for i in members:
            after[i] = raised[i] if i in raised else before[i] * max(0.0, left) / others if others else 0.0
    return _two_parts(request, before, after, mix.final_fraction)


MIXES: dict[str, Callable[[Any, MixRequest], list[StageWish]]] = {
    "constant": constant,
    "linear": linear,
    "temperature": temperature,
    "upsample_end": upsample_end,
}


def after_step(wishes: Sequence[StageWish], step: int, step_tokens: int) -> list[StageWish]:
    """What is left of the stages of a whole run once ``step`` steps are done."""
    lengths = whole_steps([wish.tokens for wish in wishes], step_tokens)
    left, end = [], 0
    for wish, length in zip(wishes, lengths, strict=True):
        end += length
        if end > step:
            left.append(replace(wish, tokens=min(length, end - step) * step_tokens))
    return left


def share_general_of(point: MixPoint | StageSection, sources: Sequence[PlanSource]) -> float:
    """As stated; else the weights are shares of the whole, and the stores' labels say which are general."""
    if point.share_general is not None:
        return point.share_general
    general = sum(point.weights[source.name] for source in sources if source.group == "general")
    total = sum(point.weights.values())
    if total == 0:
        raise DataError("every weight of a stage is 0; without share_general they are its shares by source")
    return general / total


def _stated(point: MixPoint | StageSection, request: MixRequest, tokens: int) -> StageWish:
    weights = dict(point.weights or request.weights)
    return StageWish(tokens, share_general_of(point, request.sources), weights)


def _wish(request: MixRequest, shares: Sequence[float], num_steps: int) -> StageWish:
    """Shares by source as the plan wants them: the groups' and, inside them, weights. Rounding leaves no group with a
    sliver of a share and no source."""
    general = sum(share for source, share in zip(request.sources, shares, strict=True) if source.group == "general")
    domain = sum(share for source, share in zip(request.sources, shares, strict=True) if source.group == "domain")
    weights = {source.name: share for source, share in zip(request.sources, shares, strict=True)}
    return StageWish(num_steps * request.step_tokens, general / (general + domain), weights)


def _pieces(start: int, end: int, change: float, step_rows: int) -> Iterator[tuple[int, int]]:
    """Steps ``[start, end)`` in equal pieces, as few as a share that moves by ``change`` allows."""
    length = end - start
    steady = math.floor(2 * SHARE_ERROR * length / change + 1e-9) if change else length
    count = math.ceil(length / max(1, steady, math.ceil(MIN_STAGE_ROWS / step_rows)))
    return pairwise([start + length * i // count for i in range(count + 1)] if count else [])


def _two_parts(
    request: MixRequest, before: Sequence[float], after: Sequence[float], fraction: float
) -> list[StageWish]:
    """``after`` holds for the last ``fraction`` of the steps, at least one; a run of one step keeps ``before``."""
    last = min(request.num_steps - 1, max(1, round(request.num_steps * fraction)))
    parts = ((before, request.num_steps - last), (after, last))
    return [_wish(request, shares, length) for shares, length in parts if length]


def _scopes(scope: str, sources: Sequence[PlanSource]) -> list[list[int]]:
    """Indices of the sources that share among themselves."""
    if scope == "all":
        return [list(range(len(sources)))]
    groups = [[i for i, source in enumerate(sources) if source.group == group] for group in ("general", "domain")]
    return [members for members in groups if members]


def _tempered(tau: float, mix: TemperatureMix, request: MixRequest) -> list[float]:
    usual = request.usual_shares()
    shares = [0.0] * len(usual)
    for members in _scopes(mix.scope, request.sources):
        whole = sum(usual[i] for i in members)
        parts = temperature_shares([request.sources[i].num_tokens for i in members], tau)
        for i, part in zip(members, parts, strict=True):
            shares[i] = whole * part
    return shares


def temperature_shares(sizes: Sequence[int], tau: float) -> list[float]:
    """``sizes ** (1 / tau)``, summing to 1; in logarithms, since a small ``tau`` overflows."""
    logs = [math.log(size) / tau for size in sizes]
    raw = [math.exp(value - max(logs)) for value in logs]
    return [value / sum(raw) for value in raw]
