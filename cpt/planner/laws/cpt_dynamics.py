"""The learning dynamics of continual pre-training (arXiv 2505.07796): a law of curves, and a law of mixtures from it.

Curves (eq. 6), one for the loss on the old data (B > 0) and one for the new (B < 0), nats:

    L = L0 + A (S1_pt + S1_cpt)^-alpha - C1 S2_pt - C2 S2_cpt + B (1 - (1 + E S1_cpt)^-beta)

S1 and S2 are the areas of the learning rate (``cpt.planner.lr_areas``) before and after training was continued, with
rates as they are: 30,000 steps at 2e-4 are S1_pt = 6. The first part is where the loss on the same data would have
gone, the last is the shift of the distribution, which depends neither on when training is continued nor on size.

Mixtures (eq. 8 at a constant rate), with r the share of the domain:

    general  L = L0 + A ((1 + S1 / S)^-alpha - 1) + B (1 - (1 + E S1)^-beta) (1 - exp(-a2 r)) / (1 - exp(-a2))
    domain   L = L0 + A ((1 + S1 / S)^-alpha - 1) - B (1 - (1 + E S1)^-beta) (exp(a2 r) - 1) / (exp(a2) - 1)

S1 counts billions of tokens times the rate in units of 1e-4, or billions of tokens where a rate is unknown; S is S1_pt
in the same units, a parameter, as the history of an open base is not known. A (the paper's, times S^-alpha) is what the
old trend could still win, B the whole shift of pure domain data (the paper's, times the denominator), both in nats and
positive. a2 is positive in the paper; here it has either sign, as measured general losses can rise ever faster with the
domain's share. L0 is the measured loss of the base, or one parameter where none is known. Where it is, there is one
more term, ``rewarm``, for any number of tokens above 0: the bump of the re-warmed rate (-C2 S2_cpt), settled before
the first measurement. Unlike D-CPT, the general loss may rise with tokens and fall again later.

Owns both formulas. A base of another size needs its own base loss; the law has no term in the number of parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpt.planner.curves import LossCurve
from cpt.planner.fitting import FitProblem, FloatArray, Parameter, fit_best, flat_parameters, pinned, positive
from cpt.planner.laws.law import Inputs, Samples, parametric
from cpt.planner.lr_areas import annealing_area, forward_area

PAPER = "arXiv 2505.07796"
NAMES = ("L0", "A", "alpha", "C1", "C2", "B", "E", "beta")
RATE_UNIT = 1e-4
FLAT = 1e-4


def dynamics(
    s1_pt: FloatArray | float,
    s1_cpt: FloatArray | float,
    s2_pt: FloatArray | float,
    s2_cpt: FloatArray | float,
    params: Mapping[str, float],
) -> FloatArray:
    """Loss in nats by eq. 6; ``params`` has the names of ``NAMES``. C1, C2 may be absent where S2 is 0."""
    trunk = params["L0"] + params["A"] * (np.asarray(s1_pt) + s1_cpt) ** -params["alpha"]
    annealed = params.get("C1", 0.0) * np.asarray(s2_pt) + params.get("C2", 0.0) * np.asarray(s2_cpt)
    shift = params["B"] * (1.0 - (1.0 + params["E"] * np.asarray(s1_cpt)) ** -params["beta"])
    return np.asarray(trunk - annealed + shift)


@dataclass(frozen=True)
class History:
    """What is known of the base's own training: ``s1`` None where it is not (it is then fitted)."""

    s1: float | None = None
    s2: float = 0.0


@dataclass(frozen=True)
class DynamicsFit:
    """Eq. 6 with its parameters (``S1_pt`` among them); ``rises``: the loss on old data, B > 0."""

    params: Mapping[str, float]
    history: History
    warnings: tuple[str, ...]

    def predict(self, rates: FloatArray) -> FloatArray:
        """(T,) losses at every step of a continuation with these ``rates`` (T,)."""
        s1, s2 = forward_area(rates), annealing_area(rates)
        return dynamics(self.params["S1_pt"], s1, self.history.s2, s2, self.params)


def fit_dynamics(curves: Sequence[LossCurve], history: History, *, old_data: bool, seed: int = 0) -> DynamicsFit:
    """Eq. 6 fitted on whole curves of one base's continuations, all on the old data's loss or all on the new.

    C1 S2_pt is a constant that no continuation of one base can tell from L0: C1 is 0 and L0 holds it.
    """
    losses = np.concatenate([curve.losses for curve in curves])
    s1 = np.concatenate([forward_area(curve.rates)[curve.steps] for curve in curves])
    s2 = np.concatenate([annealing_area(curve.rates)[curve.steps] for curve in curves])
    sign = 1.0 if old_data else -1.0
    annealed = bool(np.ptp(s2) > 0)
    parameters = (*_curve_ranges(losses, s1, history.s1), _annealing_range(s2) if annealed else pinned("C2", 0.0))
    problem = FitProblem(parameters, lambda theta: _curve(theta, s1, s2, sign), losses)
    best = fit_best(problem, seed=seed)
    params = dict(zip(problem.names, best.theta[0].tolist(), strict=True))
    params |= {"B": sign * params["B"], "C1": 0.0}
    warnings = [] if best.converged[0] else ["the fit did not converge; its parameters are rough"]
    flat = flat_parameters(problem, best.theta[0])
    if flat:
        warnings.append(f"the curves do not settle {', '.join(flat)}; give S1_pt, or longer curves")
    return DynamicsFit(params, history, tuple(warnings))


def _curve(theta: FloatArray, s1: FloatArray, s2: FloatArray, sign: float) -> tuple[FloatArray, FloatArray]:
    """Eq. 6 with ``theta`` (S, 8) in the order L0, A, alpha, S1_pt, B, E, beta, C2; ``sign`` is B's."""
    floor, a, alpha, before, b, e, beta, c2 = theta.T[:, :, None]
    log_area = np.log(before + s1)
    power = np.exp(-alpha * log_area)
    arrived, by_e, by_beta = _shift(e, beta, s1)
    slopes = (
        np.ones_like(power),
        power,
        -a * power * log_area,
        -a * alpha * power / (before + s1),
        sign * arrived,
        sign * b * by_e,
        sign * b * by_beta,
        np.broadcast_to(-s2, power.shape),
    )
    return floor + a * power - c2 * s2 + sign * b * arrived, np.stack(slopes, axis=1)


def _shift(e: FloatArray, beta: FloatArray, s1: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """1 - (1 + E S1)^-beta, and its derivatives by E and beta."""
    base = 1.0 + e * s1
    log_base = np.log1p(e * s1)
    left = np.exp(-beta * log_base)
    return 1.0 - left, beta * left * s1 / base, left * log_base


def _curve_ranges(losses: FloatArray, s1: FloatArray, before: float | None) -> tuple[Parameter, ...]:
    lowest, end = float(losses.min()), float(s1.max())
    history = positive("S1_pt", 1e-3 * end, 1e4 * end, (0.3 * end, 30 * end)) if before is None else pinned("", before)
    return (
        positive("L0", 0.1 * lowest, 1.5 * lowest, (0.7 * lowest, lowest)),
        positive("A", 1e-4, 1e3, (0.1, 2.0)),
        positive("alpha", 0.02, 3.0, (0.2, 1.0)),
        replace(history, name="S1_pt"),
        positive("B", 1e-4, 30.0, (0.1, 2.0)),
        positive("E", 1e-2 / end, 1e6 / end, (3 / end, 1e4 / end)),
        positive("beta", 0.01, 5.0, (0.1, 1.0)),
    )


def _annealing_range(s2: FloatArray) -> Parameter:
    full = float(np.abs(s2).max())
    return positive("C2", 1e-5 / full, 10.0 / full, (0.01 / full, 0.3 / full))


def replay(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """Eq. 8 at a constant rate. ``theta`` (S, 9) in the order L0, rewarm, A, alpha, S, B, E, beta, a2."""
    floor, rewarm, a, alpha, before, b, e, beta, a2 = theta.T[:, :, None]
    s1 = area(inputs)
    known = np.isfinite(inputs.base_loss)
    bumped = np.where(inputs.tokens > 0, 1.0, 0.0)
    start = np.where(known, inputs.base_loss, floor) + rewarm * bumped
    grown = 1.0 + s1 / before
    log_grown = np.log(grown)
    power = np.exp(-alpha * log_grown)
    arrived, by_e, by_beta = _shift(e, beta, s1)
    mixed, by_a2 = _mixed(a2, inputs)
    slopes = (
        np.broadcast_to(np.where(known, 0.0, 1.0), power.shape),
        np.broadcast_to(bumped, power.shape),
        power - 1.0,
        -a * power * log_grown,
        a * alpha * power / grown * s1 / before**2,
        arrived * mixed,
        b * by_e * mixed,
        b * by_beta * mixed,
        b * arrived * by_a2,
    )
    return start + a * (power - 1.0) + b * arrived * mixed, np.stack(slopes, axis=1)


def area(inputs: Inputs) -> FloatArray:
    """(n,) S1 of the continuation: billions of tokens, times the rate in 1e-4 where every observation has one."""
    known = bool(np.isfinite(inputs.lr).all())
    return np.asarray(inputs.tokens * inputs.lr / RATE_UNIT if known else inputs.tokens)


def _mixed(a2: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """The part of the whole shift that this mixture causes, with its sign, and its derivative by a2.

    (1 - exp(-a r)) / (1 - exp(-a)), which is r at a = 0: there a series stands in for 0 / 0.
    """
    old = inputs.target == "general"
    share = 1.0 - inputs.own_share if old else inputs.own_share
    bend = a2 if old else -a2
    flat = np.abs(bend) < FLAT
    safe = np.where(flat, 1.0, bend)
    part, whole = -np.expm1(-safe * share), -np.expm1(-safe)
    slope = (share * np.exp(-safe * share) * whole - part * np.exp(-safe)) / whole**2
    middle = 0.5 * share * (1.0 - share)
    mixed = np.where(flat, share + bend * middle, part / whole)
    by_bend = np.where(flat, middle, slope)
    return (mixed, by_bend) if old else (-mixed, by_bend)


def _replay_ranges(samples: Samples) -> tuple[Parameter, ...]:
    losses, s1 = samples.losses, area(samples.inputs)
    lowest, highest, end = float(losses.min()), float(losses.max()), float(s1.max())
    known = np.isfinite(samples.inputs.base_loss)
    floor = positive("L0", 0.3 * lowest, 3.0 * highest, (0.9 * lowest, 1.3 * highest))
    bump = 0.1 * lowest
    return (
        pinned("L0", float(samples.inputs.base_loss.mean())) if known.all() else floor,
        Parameter("rewarm", -5 * bump, 5 * bump, -bump, bump, log=False) if known.any() else pinned("rewarm", 0.0),
        positive("A", 1e-5 * lowest, lowest, (0.005 * lowest, 0.3 * lowest)),
        positive("alpha", 0.02, 3.0, (0.2, 1.0)),
        positive("S", 1e-2 * end, 1e3 * end, (0.3 * end, 30.0 * end)),
        positive("B", 1e-5 * lowest, 3.0 * lowest, (0.01 * lowest, 0.5 * lowest)),
        positive("E", 1e-2 / end, 1e6 / end, (3.0 / end, 1e4 / end)),
        positive("beta", 0.01, 5.0, (0.1, 1.0)),
        Parameter("a2", -10.0, 10.0, -4.0, 4.0, log=False),
    )


CPT_DYNAMICS = parametric(
    "cpt_dynamics",
    replay,
    _replay_ranges,
    title="CPT dynamics with replay: old trend + shift of the distribution, leaving from the base loss",
    paper=f"{PAPER}, eq. 8",
    sizes=False,
    rises=True,
)
