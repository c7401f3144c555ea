"""Splitting rows over sources: integers in, integers out, no files and no plan.

Owns the rules by which wished shares become quotas: largest remainder, water-filling under caps, rows per block.
Refuses nothing: the plan checks what goes in and says in words what came out.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise


def whole_steps(tokens: Sequence[int], step_tokens: int) -> list[int]:
    """Steps of each stage: it ends at the whole steps of the tokens summed so far, and has at least one."""
    ends = [0]
    for total in accumulate(tokens):
        ends.append(max(ends[-1] + 1, total // step_tokens))
    return [end - start for start, end in pairwise(ends)]


def apportion(parts: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to ``parts``, sum ``total``, by largest remainder: ``([2, 1, 1], 10) -> [5, 3, 2]``."""
    scale = Fraction(total) / sum(map(Fraction, parts))
    exact = [Fraction(part) * scale for part in parts]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def water_fill(target: float, weights: Sequence[float], room: Sequence[float]) -> list[float]:
    """Split ``target`` by ``weights``; no part exceeds its room, and what one is denied goes to the others by weight.

    ``(100, [2, 1, 1], [30, 20, 90]) -> [30, 20, 50]``. The sum is below ``target`` only when all rooms are full.
    """
    parts = [0.0] * len(weights)
    open_parts = [i for i, weight in enumerate(weights) if weight > 0]
    while open_parts:
        scale = target / sum(weights[i] for i in open_parts)
        full = [i for i in open_parts if weights[i] * scale >= room[i]]
        for i in full or open_parts:
            parts[i] = min(room[i], weights[i] * scale)
        target -= sum(parts[i] for i in full)
        open_parts = [i for i in open_parts if i not in full] if full else []
    return parts


def fill_groups(
    num_rows: int, share_general: float, weights: tuple[list[float], list[float]], room: Sequence[float]
) -> list[float]:
    """Rows by source: each group fills its own share first, then takes what the other could not give.

    ``weights`` = (general, domain), each over all sources with zeros for the other group's. The sum is below
    ``num_rows`` only when all rooms are full.
    """
    general, domain = weights
    general_rows = sum(water_fill(share_general * num_rows, general, room))
    domain_parts = water_fill(num_rows - general_rows, domain, room)
    general_parts = water_fill(num_rows - sum(domain_parts), general, room)
    return [a + b for a, b in zip(general_parts, domain_parts, strict=True)]


def fair_room(room: Sequence[float], here: Sequence[float], ahead: Sequence[float]) -> list[float]:
    """Room for one stage that leaves later ones their part; ``here``: rows wished in it, ``ahead``: from it on.

    A source with room for 60 rows, of which this stage wishes 40 and later ones 80, gives this stage 20.
    """
    return [r - min(1.0, r / a) * (a - h) if a else r for r, h, a in zip(room, here, ahead, strict=True)]


def block_counts(parts: list[float], room: list[float], num_rows: int, block_rows: int) -> list[int]:
    """Rows per block. A source that rounding up would push over its cap is rounded down; the others share the rest."""
    exact = [Fraction(part) * block_rows / num_rows for part in parts]
    blocks = Fraction(num_rows, block_rows)
    capped = [math.ceil(value) * blocks > limit for value, limit in zip(exact, room, strict=True)]
    if all(cap or not part for cap, part in zip(capped, parts, strict=True)):
        return apportion(parts, block_rows)  # everything is at its cap: over by less than a row per block
    counts = [math.floor(value) if cap else 0 for value, cap in zip(exact, capped, strict=True)]
    free = apportion([0.0 if cap else part for part, cap in zip(parts, capped, strict=True)], block_rows - sum(counts))
    counts = [count + extra for count, extra in zip(counts, free, strict=True)]
    for index, part in enumerate(parts):
        if part and not counts[index] and not capped[index]:
            counts[counts.index(max(counts))] -= 1
            counts[index] = 1
    return counts
