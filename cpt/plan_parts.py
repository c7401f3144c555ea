"""What a plan is made of: its sources, its stages, and the wish that a stage comes from.

Owns the rules of each part by itself, and what shares a wish means for given sources. Refuses to know caps and rows:
the plan (``cpt.plan``) turns wishes into quotas.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from cpt.json_fields import check_integer, check_text
from cpt.rundir import DataError

Group = Literal["general", "domain"]


@dataclass(frozen=True)
class PlanSource:
    """One source as the plan sees it; ``num_rows`` rows of ``seq_len`` tokens are one epoch of its packed store.

    ``in_order``: a curriculum, whose rows are read from first to last; any other source's rows are shuffled.
    ``rows_by_length``: (seq_len, rows of an epoch) of every other row length that a stage has.
    """

    name: str
    group: Group
    num_rows: int
    num_tokens: int
    content_hash: str
    in_order: bool = False
    rows_by_length: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_text("name", self.name)
        if self.group not in get_args(Group):
            raise DataError(f"group of source {self.name!r} is {self.group!r}; it must be 'general' or 'domain'")
        if check_integer("num_rows", self.num_rows, low=0) == 0:
            raise DataError(
                f"source {self.name!r} holds {self.num_tokens} tokens, too few for one row; "
                "give it more text, shorten seq_len or leave the source out"
            )
        check_integer("num_tokens", self.num_tokens, low=1)
        check_text("content_hash", self.content_hash)
        if not isinstance(self.in_order, bool):
            raise DataError(f"in_order of source {self.name!r} is {self.in_order!r:.80}; it must be true or false")
        for pair in self.rows_by_length:
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise DataError(f"rows_by_length of source {self.name!r} holds {pair!r:.80}; each is (seq_len, rows)")
            check_integer("seq_len in rows_by_length", pair[0], low=1)
            check_integer("rows in rows_by_length", pair[1], low=0)  # 0: too few tokens for one; no stage may draw it


@dataclass(frozen=True)
class Stage:
    """Rows ``[start_row, end_row)`` with constant shares: a block takes ``block_counts[i]`` rows of plan source i.

    ``seq_len``: tokens of its rows where that is not the plan's.
    """

    start_row: int
    end_row: int
    block_counts: tuple[int, ...]
    seq_len: int | None = None

    def __post_init__(self) -> None:
        check_integer("start_row", self.start_row, low=0)
        check_integer("end_row", self.end_row, low=self.start_row + 1)
        if not isinstance(self.block_counts, tuple):
            raise DataError(f"block_counts is {self.block_counts!r:.80}; it must be a list of integers")
        for index, count in enumerate(self.block_counts):
            check_integer(f"block_counts[{index}]", count, low=0)
        if self.seq_len is not None:
            check_integer("seq_len", self.seq_len, low=1)

    @property
    def num_rows(self) -> int:
        return self.end_row - self.start_row


@dataclass(frozen=True)
class StageWish:
    """What the user asks of a stage, before caps.

    ``weights`` are relative inside a source's group; a group without any is mixed in proportion to its sources' tokens.
    ``share_domain`` may be left out (it is the rest), but if stated the two must sum to 1. ``own_tokens``: the user
    stated this stage's tokens, and not only those of the run. ``seq_len``: of its rows, default: the plan's.
    """

    tokens: int
    share_general: float
    weights: Mapping[str, float] = field(default_factory=dict)
    share_domain: float | None = None
    own_tokens: bool = False
    seq_len: int | None = None

    def __post_init__(self) -> None:
        check_integer("tokens of a stage", self.tokens, low=1)
        for name, share in (("share_general", self.share_general), ("share_domain", self.share_domain)):
            if share is not None and not 0 <= share <= 1:
                raise DataError(f"{name} is {share}; a share of tokens lies between 0 and 1")
        if self.share_domain is not None and abs(self.share_general + self.share_domain - 1) > 1e-6:
            total = self.share_general + self.share_domain
            raise DataError(
                f"share_general {self.share_general} + share_domain {self.share_domain} = {total:.6g}; "
                f"they must sum to 1, for example share_domain = {1 - self.share_general:.6g}"
            )
        for source, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise DataError(f"weight of source {source!r} is {weight}; it must be a finite number >= 0")

    def share(self, group: Group) -> float:
        return self.share_general if group == "general" else 1 - self.share_general


def micro_rows(micro_batch_size: int, *, seq_len: int, stated_for: int) -> int:
    """Rows per rank and pass of a stage: ``micro_batch_size`` is stated for rows of one length, and rows of m times
    that length come m times fewer at a time, so that memory stays about the same; at least one.
    """
    return max(min(1, micro_batch_size), micro_batch_size * stated_for // seq_len)


def heads_rule(heads: int, kv_heads: int, shared: int) -> str | None:
    """Why ``shared`` ranks cannot share the attention heads of a model; None: they can."""
    if heads % shared:
        return f"must divide the model's {heads} attention heads, of which each rank takes a part"
    if kv_heads % shared and shared % kv_heads:
        return f"must divide the model's {kv_heads} key-value heads, or be a multiple of them"
    return None


def group_weights(sources: Sequence[PlanSource], wish: StageWish, group: Group) -> list[float]:
    """Weights of a group's sources, summing to 1, and zero for the others; all zero if no source is usable."""
    members = [source.name for source in sources if source.group == group]
    missing = [name for name in members if name not in wish.weights]
    if missing and len(missing) < len(members):
        raise DataError(
            f"weights name some {group} sources but not {', '.join(missing)}; "
            "give every source of the group a weight (0 leaves it out) or none"
        )
    raw = [wish.weights.get(s.name, s.num_tokens) if s.group == group else 0.0 for s in sources]
    total = sum(raw)
    return [weight / total for weight in raw] if total else [0.0] * len(raw)


def wished_shares(sources: Sequence[PlanSource], wish: StageWish) -> list[float]:
    unknown = sorted(set(wish.weights) - {source.name for source in sources})
    if unknown:
        known = ", ".join(source.name for source in sources)
        raise DataError(f"weights name the unknown source {unknown[0]!r}; the plan's sources are {known}")
    shares = [0.0] * len(sources)
    for group in get_args(Group):
        weights = group_weights(sources, wish, group)
        if wish.share(group) > 0 and not any(weights):
            raise DataError(
                f"share_{group} is {wish.share(group):.6g} but no {group} source has a weight above 0; "
                f"add a {group} source or set share_{group} to 0"
            )
        shares = [share + wish.share(group) * weight for share, weight in zip(shares, weights, strict=True)]
    return shares
