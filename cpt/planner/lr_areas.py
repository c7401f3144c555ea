"""The two areas of a learning-rate schedule: S1, how far training went, and S2, how much it has annealed.

    S1(t) = sum of the rates up to step t
    S2(t) = sum over i <= t of m_i,   m_i = decay m_(i-1) + eta_(i-1) - eta_i

S2 (arXiv 2408.11029, section 3) is the area between the rate and its delayed self: a lower rate pays off over the next
1 / (1 - decay) steps. A re-warm has negative increments, so S2 falls while it lasts, which is the law's explanation of
the bump in the loss. Refuses to read schedules (``cpt.planner.curves``).
"""

from itertools import accumulate

import numpy as np

from cpt.planner.fitting import FloatArray

DECAY = 0.999  # lambda of the paper


def forward_area(rates: FloatArray) -> FloatArray:
    """S1 at every step (T,): the rates up to and including that step."""
    return np.cumsum(rates)


def annealing_area(rates: FloatArray, decay: float = DECAY, *, start: int = 0) -> FloatArray:
    """S2 at every step (T,). Changes of the rate up to step ``start`` do not count: the warm-up anneals nothing."""
    drops = np.zeros(len(rates))
    drops[start + 1 :] = -np.diff(rates[start:])
    momentum = accumulate(drops.tolist(), lambda m, drop: decay * m + drop)
    return np.cumsum(np.fromiter(momentum, dtype=np.float64, count=len(rates)))
