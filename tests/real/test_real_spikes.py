"""Published loss curves hold no spike, and one that is put into them is found at its step."""

import os
from pathlib import Path

import numpy as np
import pytest

from cpt.planner.curves import read_curve
from cpt.train.spikes import SpikeDetector

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
CURVES = SHARED.parent / "planner_data/lr_curves"
pytestmark = pytest.mark.skipif(not CURVES.is_dir(), reason=f"{CURVES} is absent; set CPT_SHARED_DATA to its sibling")
FILES = sorted(CURVES.glob("*.csv"))
WARMUP = 2160
ROWS, ROW = 256, 1024


def spikes(losses: list[float]) -> list[int]:
    detector, found = SpikeDetector(8.0, ROW), []
    for place, loss in enumerate(losses):
        sums, counted = {"c4": loss * ROWS * ROW}, {"c4": ROWS * ROW}
        if detector.in_losses(sums, counted, settled=True):
            found.append(place)
        else:
            detector.accept(sums, counted, 1.0)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_real_curve_raises_no_alarm_and_a_spike_in_it_does(file: Path) -> None:
    losses = [float(loss) for loss in read_curve(file, WARMUP).losses]
    assert len(losses) > 90 and spikes(losses) == []
    at = int(np.argmax(np.asarray(losses[60:]))) + 60  # where the curve is highest anyway
    losses[at] += 0.5
    assert spikes(losses) == [at]
