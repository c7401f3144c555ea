"""How many steps pilot runs may take: from a budget in FLOPs to token budgets, branch points and evaluation steps.

Owns the arithmetic, in whole optimizer steps, and refuses a budget that cannot pay for a grid worth fitting. Reads no
file. A training FLOP count is 6 * parameters * tokens throughout (arXiv 2001.08361, section 2.1).

One *cell* of the grid (one model, one share, one seed) is a trunk and its branches. The trunk warms up, stays at the
constant rate and decays at its end: it is itself the run of the largest token budget. Each smaller budget is a branch:
it takes over the trunk's state inside the constant phase and decays from there (warm-up, stable, decay: arXiv
2404.06395, section 4), so it costs its decay alone. Token budgets are whole multiples of the smallest; then the branch
points are the same multiples of the first one, and a trunk that saves every so many steps saves at each of them.

Worked example: stable 8, decay 2, multiples 1, 2, 4. Budgets of 10, 20 and 40 steps; the trunk takes 40 (decay from 32
on), branches leave it after 8 and 16 and take 2 and 4 more: 46 steps instead of 70.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cpt.problems import ConfigError, Problem

FLOPS_PER_PARAM_TOKEN = 6
MIN_SMALLEST_STEPS = 8  # below it the smallest run is all warm-up and decay


@dataclass(frozen=True)
class Ladder:
    """The token budgets of one cell, in steps; ``multiples`` ascend from 1."""

    stable_steps: int  # of the smallest budget, warm-up included
    decay_steps: int  # of the smallest budget
    multiples: tuple[int, ...]

    def total_steps(self, multiple: int) -> int:
        return multiple * (self.stable_steps + self.decay_steps)

    def branch_step(self, multiple: int) -> int:
        """The step after which the decay of this budget begins."""
        return multiple * self.stable_steps

    @property
    def trunk_steps(self) -> int:
        return self.total_steps(self.multiples[-1])

    @property
    def trained_steps(self) -> int:
        """Steps that a whole cell computes: the trunk's, and the decays of the branches."""
        return self.trunk_steps + self.decay_steps * sum(self.multiples[:-1])


def run_flops(params: float, tokens: float) -> float:
    """Training FLOPs of one run: 6 N D."""
    return float(FLOPS_PER_PARAM_TOKEN * params * tokens)  # of integers it would be one, beyond the floats


def grid_flops(ladder: Ladder, params: Sequence[int], *, cells_per_model: int, step_tokens: int) -> float:
    """Training FLOPs of all trunks and branches; evaluations are not counted."""
    return run_flops(sum(params) * cells_per_model, ladder.trained_steps * step_tokens)


def make_ladder(smallest_steps: int, multiples: Sequence[int], *, decay_share: float) -> Ladder:
    """``smallest_steps`` split into a constant part and a decay of ``decay_share``, both at least one step."""
    decay_steps = min(max(1, round(decay_share * smallest_steps)), smallest_steps - 1)
    return Ladder(smallest_steps - decay_steps, decay_steps, tuple(multiples))


def geometric_multiples(num_budgets: int, ratio: int = 2) -> tuple[int, ...]:
    """``3 -> (1, 2, 4)``."""
    return tuple(ratio**power for power in range(num_budgets))


def ladder_for_flops(
    budget_flops: float, params: Sequence[int], *, cells_per_model: int, step_tokens: int, num_budgets: int,
    decay_share: float,
) -> Ladder:  # fmt: skip
    """The largest ladder whose grid costs at most ``budget_flops``.

    Raises:
        ConfigError: not even budgets of MIN_SMALLEST_STEPS steps and up can be paid for; it says what they cost.
    """
    multiples = geometric_multiples(num_budgets)

    def cost(steps: int) -> float:
        ladder = make_ladder(steps, multiples, decay_share=decay_share)
        return grid_flops(ladder, params, cells_per_model=cells_per_model, step_tokens=step_tokens)

    if cost(MIN_SMALLEST_STEPS) > budget_flops:
        needed = cost(MIN_SMALLEST_STEPS)
        cells = cells_per_model * len(params)
        rule = (
            f"is less than the smallest grid costs: {needed:.3g} FLOPs for {cells} cells (models x shares x seeds) of "
            f"{num_budgets} token budgets from {MIN_SMALLEST_STEPS} steps of {step_tokens:,} tokens up"
        )
        fix = (
            f"raise it {needed / budget_flops:.2g} times, or lower the number of shares, bases or seeds, "
            "pilots.num_budgets, or train.global_batch_tokens"
        )
        raise ConfigError(Problem("pilots.budget_fraction", f"{budget_flops:.3g} FLOPs", rule, fix))
    low, high = MIN_SMALLEST_STEPS, 2 * MIN_SMALLEST_STEPS
    while cost(high) <= budget_flops:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget_flops else (low, middle)
    return make_ladder(low, multiples, decay_share=decay_share)


def ladder_for_tokens(budgets_tokens: Sequence[int], *, step_tokens: int, decay_share: float) -> Ladder:
    """The ladder of token budgets that a user states; each is rounded down to whole steps of the smallest.

    Raises:
        ConfigError: a budget is not a whole multiple of the smallest, or that one is less than two steps.
    """
    smallest, *_ = ordered = sorted(set(budgets_tokens))
    if smallest < 2 * step_tokens:
        rule = (
            f"is less than two steps of {step_tokens:,} tokens (train.global_batch_tokens): one to train, one to decay"
        )
        raise ConfigError(Problem("pilots.budgets", smallest, rule, f"give at least {2 * step_tokens:,}"))
    odd = [tokens for tokens in ordered if tokens % smallest]
    if odd:
        nearest = [max(1, round(tokens / smallest)) * smallest for tokens in ordered]
        rule = (
            f"must be whole multiples of the smallest ({smallest:,}): their runs branch off one trunk, which saves in "
            "equal distances"
        )
        raise ConfigError(Problem("pilots.budgets", list(budgets_tokens), rule, f"the nearest are {nearest}"))
    multiples = [tokens // smallest for tokens in ordered]
    return make_ladder(smallest // step_tokens, multiples, decay_share=decay_share)


def evaluation_steps(first_step: int, last_step: int, count: int) -> tuple[int, ...]:
    """At most ``count`` steps from ``first_step`` to ``last_step``, both included, in equal ratios: many early ones.

    ``evaluation_steps(1, 64, 7) -> (1, 2, 4, 8, 16, 32, 64)``. Where rounding makes two equal there is one less.
    """
    if count < 2 or first_step >= last_step:
        return (last_step,)
    ratio = (last_step / first_step) ** (1 / (count - 1))
    return tuple(sorted({*(round(first_step * ratio**power) for power in range(count - 1)), last_step}))
