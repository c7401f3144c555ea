"""Requirements are understood or refused with the nearest name; what was not measured is never met."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.eval.gate import Measurement, check, is_requirement, parse_requirements
from cpt.problems import ConfigError

NAMES = ["domain_gain", "general_forgetting", "relative_general_forgetting", "general.accuracy", "web.low"]
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def one(text: str, measured: Measurement) -> tuple[bool, str]:
    [requirement] = parse_requirements([text], NAMES)
    [found] = check([requirement], {requirement.metric: measured})
    return found.met, found.note


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("domain_gain >= 0.10", ("domain_gain", "", ">=", 0.1)),
        (" general_forgetting.high<=2e-2 ", ("general_forgetting", "high", "<=", 0.02)),
        ("general.accuracy.low > 55%", ("general.accuracy", "low", ">", 0.55)),
        ("relative_general_forgetting < -1%", ("relative_general_forgetting", "", "<", -0.01)),
        ("web.low < 1", ("web.low", "", "<", 1.0)),
        ("web.low.high < 1", ("web.low", "high", "<", 1.0)),
    ],
)
def test_a_requirement_is_a_metric_an_end_of_its_interval_an_operator_and_a_number(
    text: str, parts: tuple[str, str, str, float]
) -> None:
    [found] = parse_requirements([text], NAMES)
    assert (found.metric, found.end, found.operator) == parts[:3]
    assert found.bound == pytest.approx(parts[3])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("domain_gian >= 0.1", "did you mean domain_gain"),
        ("forgetting <= 0.1", "did you mean general_forgetting or relative_general_forgetting"),
        ("zzz <= 0.1", "there are domain_gain, general.accuracy"),
        ("domain_gain", "a shell takes > and <"),
        ("domain_gain = 0.1", "is not a requirement"),
        ("domain_gain => 0.1", "is not a requirement"),
        ("0.1 <= domain_gain <= 0.2", "is not a requirement"),
        ("domain_gain >= much", "'much' is not a number"),
        ("domain_gain >= nan", "'nan' is not a number"),
        ("domain_gain.median >= 1", "there is no metric 'domain_gain.median'"),
        ("", "is not a requirement"),
    ],
)
def test_what_cannot_be_understood_is_refused_and_says_what_to_write(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_requirements([text], NAMES)
    assert said in str(caught.value) and "--require" in str(caught.value)


def test_every_requirement_that_cannot_be_understood_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_requirements(["domain_gian >= 1", "domain_gain >= 1", "genral.accuracy > 0"], NAMES)
    assert [problem.value for problem in caught.value.problems] == ["domain_gian >= 1", "genral.accuracy > 0"]


def test_a_gate_without_a_requirement_is_refused() -> None:
    with pytest.raises(ConfigError, match="is required"):
        parse_requirements([], NAMES)


@given(value=FINITE, bound=FINITE)
def test_the_operators_are_those_of_arithmetic(value: float, bound: float) -> None:
    measured = Measurement(value)
    met = {sign: one(f"domain_gain {sign} {bound!r}", measured)[0] for sign in (">=", "<=", ">", "<")}
    assert met == {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}


@given(bound=FINITE, sign=st.sampled_from([">=", "<=", ">", "<"]), end=st.sampled_from(["", ".low", ".high"]))
@pytest.mark.parametrize("unknown", [None, math.nan, math.inf, -math.inf])
def test_what_is_unknown_or_not_finite_is_never_met(unknown: float | None, bound: float, sign: str, end: str) -> None:
    met, note = one(f"domain_gain{end} {sign} {bound!r}", Measurement(unknown, unknown, unknown, why="no base"))
    assert not met and "no base" in note


def test_an_interval_that_is_not_known_does_not_stand_in_for_the_value() -> None:
    measured = Measurement(0.3, why="an older version measured it without standard errors")
    assert one("domain_gain >= 0.1", measured)[0]
    met, note = one("domain_gain.low >= 0.1", measured)
    assert not met and "the low end" in note and "older version" in note


def test_a_metric_that_nobody_measured_is_not_met() -> None:
    [found] = check(parse_requirements(["domain_gain >= -9"], NAMES), {})
    assert not found.met and "was not measured" in found.note


@pytest.mark.parametrize(
    ("text", "met", "said"),
    [
        ("domain_gain >= 0.1", True, "require domain_gain.low"),
        ("domain_gain >= 0.01", True, ""),
        ("domain_gain.low >= 0.1", False, "0.05 is not >= 0.1"),
        ("domain_gain.high <= 0.3", True, ""),
        ("domain_gain <= 0.22", True, "the interval reaches 0.25"),
        ("domain_gain < 0.1", False, "0.15 is not < 0.1"),
    ],
)
def test_a_value_that_meets_it_while_its_interval_does_not_says_so(text: str, met: bool, said: str) -> None:
    found = one(text, Measurement(0.15, 0.05, 0.25))
    assert found[0] is met and (said in found[1] if said else found[1] == "")


def test_facts_of_a_check_are_plain_json() -> None:
    [found] = check(parse_requirements(["general.accuracy.low >= 55%"], NAMES), {"general.accuracy": Measurement(0.6)})
    assert found.to_dict() == {
        "requirement": "general.accuracy.low >= 55%",
        "metric": "general.accuracy",
        "end": "low",
        "operator": ">=",
        "bound": pytest.approx(0.55),
        "value": 0.6,
        "interval": None,
        "met": False,
        "note": "the low end of its interval is not known: it was measured without an interval",
    }


def test_a_word_with_a_comparison_is_a_requirement_and_a_folder_is_not() -> None:
    assert is_requirement("domain_gain>=0.1") and is_requirement("domain_gain = 1") and not is_requirement("runs/law")
