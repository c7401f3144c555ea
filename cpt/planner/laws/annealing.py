"""The learning-rate annealing law of loss curves (arXiv 2408.11029, section 3).

    L(s) = L0 + A S1(s)^-alpha - C S2(s)

Loss in nats; S1 the sum of the rates up to step s, warm-up included; S2 the annealing area of the rates after the
warm-up (``cpt.planner.lr_areas``, decay 0.999). Owns the formula. It pays a lowering of the rate out within some
1 / (1 - decay) steps whatever the rate is; the multi-power law (``cpt.planner.laws.multi_power``) does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpt.planner.fitting import FloatArray, Parameter, positive
from cpt.planner.laws.curve_law import CurveLaw, Track
from cpt.planner.lr_areas import DECAY, annealing_area, forward_area

PAPER = "arXiv 2408.11029"
SMALLEST_AREA = 1e-12


@dataclass(frozen=True)
class Areas:
    """S1 and S2 (n,) at the wanted steps."""

    forward: FloatArray
    annealing: FloatArray


def prepare(track: Track) -> Areas:
    forward = np.maximum(forward_area(track.rates)[track.steps], SMALLEST_AREA)
    return Areas(forward, annealing_area(track.rates, start=track.warmup_end)[track.steps])


def annealing(theta: FloatArray, areas: Areas) -> tuple[FloatArray, FloatArray]:
    """``theta`` (S, 4) in the order L0, A, alpha, C."""
    floor, a, alpha, c = theta.T[:, :, None]
    log_area = np.log(areas.forward)
    power = np.exp(-alpha * log_area)
    lowered = np.broadcast_to(-areas.annealing, power.shape)
    slopes = (np.ones_like(power), power, -a * power * log_area, lowered)
    return floor + a * power - c * areas.annealing, np.stack(slopes, axis=1)


def _ranges(tracks: Sequence[Track], losses: FloatArray) -> tuple[Parameter, ...]:
    lowest = float(losses.min())
    full = max(float(track.rates.max()) for track in tracks) / (1.0 - DECAY)  # S2 of a decay to zero
    return (
        positive("L0", 0.1 * lowest, 1.2 * lowest, (0.7 * lowest, lowest)),
        positive("A", 1e-4, 1e3, (0.1, 2.0)),
        positive("alpha", 0.02, 3.0, (0.2, 1.0)),
        positive("C", 1e-4 / full, 10.0 / full, (0.02 / full, 0.3 / full)),
    )


ANNEALING = CurveLaw(
    "annealing", "learning-rate annealing law: L0 + A S1^-alpha - C S2", PAPER, _ranges, prepare, annealing
)
