"""The loss before training at the size that is asked for: what a tolerance on forgetting is counted from.

Owns the rule. A base row (tokens = 0) of that very size is taken as it stands, which is why measuring the full model
once before planning pays. Otherwise the base rows of other sizes are joined by a power of the size.
"""

from dataclasses import dataclass

import numpy as np

from cpt.planner.observations import Observations
from cpt.rundir import DataError


@dataclass(frozen=True)
class BaseLoss:
    """Nats; ``warnings`` say when it was not measured but drawn through other sizes."""

    loss: float
    warnings: tuple[str, ...] = ()


def base_loss(observations: Observations, target: str, params: float) -> BaseLoss:
    """The starting loss of ``target`` for a model of ``params`` parameters.

    Raises:
        DataError: no base row, or only one of another size.
    """
    known = sorted(observations.base_losses(target).values())
    advice = f"add a row with tokens 0, params {params:.6g} and loss_{target} of the untrained base"
    if not known:
        raise DataError(f"{observations.path}: has no base row (tokens = 0) with loss_{target}; {advice}")
    sizes, losses = (np.array(column) for column in zip(*known, strict=True))
    same = np.abs(np.log(sizes / params)) < 0.01
    if same.any():
        return BaseLoss(float(losses[same].mean()))
    if len(np.unique(sizes)) == 1:
        if max(sizes[0] / params, params / sizes[0]) <= 1.5:
            return BaseLoss(float(losses.mean()), (f"the base loss is that of {sizes[0]:.4g} parameters; {advice}",))
        raise DataError(f"{observations.path}: its base row is of {sizes[0]:.4g} parameters; {advice}")
    slope, level = np.polyfit(np.log(sizes), np.log(losses), 1)
    value = float(np.exp(level + slope * np.log(params)))
    told = f"the base's {target} loss {value:.4f} is drawn through the base rows of other sizes; {advice}"
    return BaseLoss(value, (told,))
