"""Reports: who can fix what failed decides the exit code, and the table tells values by host with the rarest first."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from launch.preflight.checks import Check, Report, render_report, shorten

GOOD = Check("a", "pass", "fine")
DOUBTFUL = Check("b", "warn", "hm", "look")
WRONG_FILE = Check("c", "fail", "differs", "copy it", fault="user")
ILL = Check("d", "fail", "broken", "replace it")


@pytest.mark.parametrize(
    ("checks", "code"),
    [([GOOD], 0), ([GOOD, DOUBTFUL], 0), ([WRONG_FILE], 2), ([DOUBTFUL, ILL], 3), ([WRONG_FILE, ILL], 3)],
)
def test_the_exit_code_is_2_only_where_the_user_can_fix_all_that_failed(checks: list[Check], code: int) -> None:
    report = Report(checks)
    assert (report.exit_code, report.ok) == (code, code == 0)
    assert report.to_json()["exit_code"] == code and len(report.to_json()["checks"]) == len(checks)


def rendered(*checks: Check) -> str:
    out = StringIO()
    Console(file=out, width=120).print(render_report(Report(checks)))
    return out.getvalue()


def test_hosts_with_the_same_value_share_a_line_and_the_odd_one_out_comes_first() -> None:
    hosts = {"n1": "torch 2.8", "n2": "torch 2.13", "n3": "torch 2.8"}
    text = rendered(Check("versions", "fail", "differ", "install [all] of it", hosts))
    assert text.index("n2: torch 2.13") < text.index("n1, n3: torch 2.8")
    assert "install [all] of it" in text and "0 pass, 0 warn, 1 fail" in text


def test_many_hosts_are_counted_rather_than_listed() -> None:
    names = [f"n{number}" for number in range(64)]
    assert shorten(names).endswith("n7 and 56 more") and shorten(names[:8]) == ", ".join(names[:8])
    values: dict[str, Any] = dict.fromkeys(names, "x")
    assert "n9" not in rendered(Check("a", "warn", "", hosts=values))
