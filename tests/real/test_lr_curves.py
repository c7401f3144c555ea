"""Published loss curves under nine schedules: laws fitted on three of them predict the others."""

import os
from pathlib import Path

import numpy as np
import pytest

from cpt.planner.curves import LossCurve, read_curve
from cpt.planner.laws.annealing import ANNEALING
from cpt.planner.laws.curve_law import CurveFit, CurveLaw, errors_of, fit_curves, track_of
from cpt.planner.laws.multi_power import MULTI_POWER, MULTI_POWER_TIED
from cpt.planner.predict_curve import predict_curve

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
CURVES = SHARED.parent / "planner_data/lr_curves"
pytestmark = pytest.mark.skipif(not CURVES.is_dir(), reason=f"{CURVES} is absent; set CPT_SHARED_DATA to its sibling")

FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
TESTED = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
WARMUP = 2160


def curve(size: str, name: str) -> LossCurve:
    return read_curve(CURVES / f"{size}_{name}.csv", WARMUP)


def mean_error(fit: CurveFit, size: str) -> float:
    return float(np.mean([errors_of(fit.predict(track_of(c)), c.losses).mae for c in (curve(size, n) for n in TESTED)]))


@pytest.mark.parametrize(
    ("size", "constants", "error"),
    [
        ("25M", [3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257], 0.00376),
        ("100M", [2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644], 0.00435),
    ],
)
def test_published_constants_give_the_published_test_error(size: str, constants: list[float], error: float) -> None:
    assert mean_error(CurveFit(MULTI_POWER, (), np.array(constants), ()), size) == pytest.approx(error, abs=2e-5)


@pytest.mark.parametrize(
    ("law", "size", "bound"),
    [
        (MULTI_POWER_TIED, "25M", 0.0047),
        (MULTI_POWER_TIED, "100M", 0.0036),
        (MULTI_POWER, "25M", 0.0055),
        (MULTI_POWER, "100M", 0.0046),
        (ANNEALING, "25M", 0.008),
        (ANNEALING, "100M", 0.008),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_six_unseen_schedules_are_predicted(law: CurveLaw, size: str, bound: float) -> None:
    fit = fit_curves(law, [curve(size, name) for name in FITTED])
    assert mean_error(fit, size) < bound


def test_predict_curve_takes_the_published_files_as_they_are() -> None:
    paths = [CURVES / f"100M_{name}.csv" for name in FITTED]
    facts = predict_curve(paths, CURVES / "100M_wsd_20000_24000.csv", "mpl_tied", 0)
    measured = curve("100M", "wsd_20000_24000")
    predicted = np.interp(measured.steps, facts["steps"], facts["loss"])
    assert np.abs(predicted - measured.losses).mean() < 0.003
    assert facts["fit"]["mae"] < 0.002
