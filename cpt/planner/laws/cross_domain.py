"""Cross-domain D-CPT (arXiv 2406.01375): one law for several domains, told apart by how learnable they are.

    L(N, D, r, K) = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma + F / K^mu
    K = w1 / k1 + w2 k2

K is the domain-specific learnable coefficient (DLC), known from a probe run of about 1 % of the cost: ``k1`` the
domain's loss before training (nats), ``k2`` its rate of decline at the start (here nats per billion tokens; measure all
domains alike). N and D in billions, r the domain's own share. Owns the joint fit and the prediction of a domain that
was only probed.

Traps: K, F and w are known up to a scale (K -> c K, F -> c^mu F), so w1 is 1. By the formula a larger K is an easier
domain with a lower loss; one note on the paper says the opposite. Two domains cannot separate F from mu: the paper fits
four and predicts two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cpt.planner.fitting import FitProblem, FloatArray, Parameter, fit_best, flat_parameters, positive
from cpt.planner.laws.dcpt import PAPER as PAPER
from cpt.planner.laws.dcpt import data_term, dcpt, floor_and_size
from cpt.planner.laws.law import Inputs, Samples, fit_warnings
from cpt.rundir import DataError

NAMES = ("E", "A", "alpha", "B", "beta", "eta", "C", "gamma", "eps", "F", "mu", "w2")
NUM_SHARED = 9  # of them D-CPT's own


def learnable_coefficient(k1: float, k2: float, w2: float) -> float:
    """K = 1/k1 + w2 k2, the paper's chosen composition with w1 = 1."""
    return 1 / k1 + w2 * k2


def measure_learnability(tokens: FloatArray, losses: FloatArray, num_points: int = 3) -> tuple[float, float]:
    """(k1, k2) of a domain from its probe: loss before training, and decline per billion tokens at the start.

    ``tokens`` in billions, ascending from 0; k2 is the least-squares slope through the starting point over the first
    ``num_points`` measurements. A rising loss counts as no decline.
    """
    if len(tokens) < 2 or tokens[0] != 0:
        raise DataError(
            f"tokens = {tokens[:2].tolist()}: a probe starts with the loss before training (tokens = 0) and has at "
            "least one later measurement; add the base row"
        )
    seen, fall = tokens[1 : 1 + num_points], losses[0] - losses[1 : 1 + num_points]
    return float(losses[0]), max(float((seen * fall).sum() / (seen * seen).sum()), 0.0)


def cross_domain(theta: FloatArray, inputs: Inputs, k1: FloatArray, k2: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``theta`` (S, 12) in the order of ``NAMES``; ``k1`` and ``k2`` (n,) of each observation's domain."""
    shared, by_shared = dcpt(theta[:, :NUM_SHARED], inputs)
    f, mu, w2 = theta[:, NUM_SHARED:].T[:, :, None]
    coefficient = 1 / k1 + w2 * k2
    log_k = np.log(coefficient)
    per_f = np.exp(-mu * log_k)
    easy = f * per_f
    slopes = np.stack((per_f, -easy * log_k, -mu * easy * k2 / coefficient), axis=1)
    return shared + easy, np.concatenate((by_shared, slopes), axis=1)


@dataclass(frozen=True)
class CrossDomainFit:
    """The joint law; ``theta`` (12,) in the order of ``NAMES``."""

    theta: FloatArray
    warnings: tuple[str, ...]

    @property
    def params(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in zip(NAMES, self.theta, strict=True)}

    def predict(self, inputs: Inputs, k1: float, k2: float) -> FloatArray:
        """(n,) losses of a domain with the probe figures ``k1`` and ``k2``; it need not be one of the fitted."""
        same = (np.full(len(inputs), value) for value in (k1, k2))
        return np.asarray(cross_domain(self.theta[None], inputs, *same)[0][0])


def fit_cross_domain(
    samples_by_domain: Mapping[str, Samples],
    k1: Mapping[str, float],
    k2: Mapping[str, float],
    *,
    num_starts: int = 60,
    seed: int = 0,
) -> CrossDomainFit:
    """Fits all domains jointly. ``samples_by_domain``: each domain's own loss; ``k1``, ``k2``: its probe figures.

    Raises:
        DataError: fewer than two domains, a domain without its two figures, or figures that cannot be.
    """
    _check(samples_by_domain, k1, k2)
    names = list(samples_by_domain)
    joint = _joined([samples_by_domain[name] for name in names])
    lengths = [len(samples_by_domain[name]) for name in names]
    first, second = (np.repeat([figures[name] for name in names], lengths) for figures in (k1, k2))

    def evaluate(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        return cross_domain(theta, joint.inputs, first, second)

    problem = FitProblem(_ranges(joint, first, second), evaluate, joint.losses)
    best = fit_best(problem, num_starts=num_starts, seed=seed)
    warnings = fit_warnings(joint, bool(best.converged[0]), flat_parameters(problem, best.theta[0]))
    if len(names) < 4:
        warnings += (
            f"{len(names)} domains: E, F and mu are not told apart, so other domains are guesses; probe and fit four",
        )
    return CrossDomainFit(best.theta[0], warnings)


def _check(samples_by_domain: Mapping[str, Samples], k1: Mapping[str, float], k2: Mapping[str, float]) -> None:
    if len(samples_by_domain) < 2:
        raise DataError(f"{len(samples_by_domain)} domain given; the cross-domain law is fitted on two or more")
    for name in samples_by_domain:
        if name not in k1 or name not in k2:
            raise DataError(f"{name}: no k1 or no k2; measure both with a short probe run of this domain")
        if not (k1[name] > 0 and k2[name] >= 0):
            raise DataError(
                f"{name}: k1 = {k1[name]}, k2 = {k2[name]}; k1 is a loss above 0, k2 a decline of 0 or more"
            )


def _joined(parts: Sequence[Samples]) -> Samples:
    """One set of samples in which each observation's own share is the only column."""
    params, tokens, lr, base_loss = (
        np.concatenate([getattr(part.inputs, name) for part in parts])
        for name in ("params", "tokens", "lr", "base_loss")
    )
    shares = np.concatenate([part.inputs.own_share for part in parts])[:, None]
    inputs = Inputs("own", ("own",), params, tokens, shares, lr, base_loss)
    # Runs of different domains stay apart.
    starts = np.cumsum([0, *(int(part.runs.max()) + 1 for part in parts[:-1])])
    runs = np.concatenate([part.runs + start for part, start in zip(parts, starts, strict=True)])
    return Samples(inputs, np.concatenate([part.losses for part in parts]), runs)


def _ranges(samples: Samples, k1: FloatArray, k2: FloatArray) -> tuple[Parameter, ...]:
    lowest = float(samples.losses.min())
    # w2 starts where both parts of K weigh alike.
    balance = float(np.mean(1 / k1) / max(float(np.mean(k2)), 1e-12))
    return (
        *floor_and_size(samples),
        *data_term(samples),
        positive("eta", 1e-3, 5.0, (0.1, 2.0)),
        positive("C", 1e-6 * lowest, 1e2 * lowest, (0.005 * lowest, lowest)),
        positive("gamma", 0.01, 5.0, (0.1, 2.0)),
        positive("eps", np.exp(-7.0), 1.0, (0.02, 1.0)),
        positive("F", 1e-6 * lowest, 1e2 * lowest, (0.005 * lowest, lowest)),
        positive("mu", 0.01, 5.0, (0.1, 2.0)),
        positive("w2", 1e-4 * balance, 1e4 * balance, (0.1 * balance, 10 * balance)),
    )
