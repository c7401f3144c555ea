"""What was looked at and found right, doubtful or wrong, with the fix: the shape of a report and its table.

Owns the exit code of a report: 2 where the user can fix all that failed, 3 where a machine is at fault. Refuses to
look at anything itself: ``launch.preflight.run`` does for the hosts of a job, ``launch.preflight.doctor`` for one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt.exit_codes import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_USER

Status = Literal["pass", "warn", "fail"]
COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
SHOWN_HOSTS = 8


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``hosts``: values by host, where they differ or are at fault; ``fault``: who can fix it."""

    name: str
    status: Status
    found: str
    fix: str = ""
    hosts: Mapping[str, str] = field(default_factory=dict)
    fault: Literal["user", "environment"] = "environment"


@dataclass(frozen=True)
class Report:
    """All checks, of one machine or of many. ``details``: figures for programs, as plain JSON."""

    checks: Sequence[Check]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Nothing failed; there may be warnings."""
        return not self.failed

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "fail"]

    @property
    def exit_code(self) -> int:
        """0; 2 where all that failed is the user's to fix; else 3."""
        if self.ok:
            return EXIT_DONE
        return EXIT_USER if all(check.fault == "user" for check in self.failed) else EXIT_ENVIRONMENT

    def to_json(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"ok": self.ok, "exit_code": self.exit_code, "checks": checks, "details": dict(self.details)}


def render_report(report: Report) -> RenderableType:
    """One table: status, name, what was found with the values by host, the fix; and how many of each there are."""
    table = Table(show_edge=False, pad_edge=False)
    for title in ("", "check", "found", "fix"):
        table.add_column(title, overflow="fold")
    for check in report.checks:
        found = Text("\n".join((check.found, *_lines(check.hosts))))
        table.add_row(Text(check.status, style=COLOURS[check.status]), Text(check.name), found, Text(check.fix))
    numbers = {status: sum(check.status == status for check in report.checks) for status in COLOURS}
    return Group(table, Text(", ".join(f"{number} {status}" for status, number in numbers.items())))


def _lines(hosts: Mapping[str, str]) -> list[str]:
    """Hosts with the same value on one line, the rarest value first: that is the one to look at."""
    by_value: dict[str, list[str]] = {}
    for host, value in hosts.items():
        by_value.setdefault(value, []).append(host)
    return [f"{shorten(names)}: {value}" for value, names in sorted(by_value.items(), key=lambda item: len(item[1]))]


def shorten(names: Sequence[str]) -> str:
    """The names, or the first of them and how many more there are."""
    rest = len(names) - SHOWN_HOSTS
    return ", ".join(names[:SHOWN_HOSTS]) + (f" and {rest} more" if rest > 0 else "")
