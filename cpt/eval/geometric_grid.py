"""The steps at which a run measures its benchmarks: close together at first, far apart later. Pure.

What a model forgets at the start of continual pre-training it may have back before anybody looks: the stability gap
opens within the first few percent of the tokens (arXiv 2205.13452, 2406.14833). Worked example, 1000 steps: 0, then 1,
2, 4, 7, 13, 25, 50 (the first 5%, halved and rounded up until 1), then 100, 200 ... 1000.
"""

EARLY_SHARE = 0.05  # of the run's tokens; all steps have as many
LATER_PARTS = 10


def geometric_steps(num_steps: int) -> tuple[int, ...]:
    """Rising steps of a run of ``num_steps`` (at least 1), its base (0) and its end among them: about
    ``log2(num_steps) + 8`` of them, however long the run is.
    """
    steps = {0, *(-(-part * num_steps // LATER_PARTS) for part in range(1, LATER_PARTS + 1))}
    step = -(-num_steps // round(1 / EARLY_SHARE))
    while step not in steps:
        steps.add(step)
        step = -(-step // 2)
    return tuple(sorted(steps))
