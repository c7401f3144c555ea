"""The hosts of a job: a hostfile as DeepSpeed reads it, and the part of it that is chosen.

Owns the two syntaxes, ``name slots=8`` per line and ``--include/--exclude``. Refuses what DeepSpeed lets pass or finds
too late: a file that is not there (DeepSpeed goes on with this machine alone), names that mean something to pdsh or
ssh, and unequal numbers of slots, by which it numbers local ranks wrongly.

    a slots=4          --include a@b:0,2     a: 0 1 2 3   b: 0 2      refused, 4 and 2 slots
    b slots=4          --exclude a:0,1@b     a: 2 3                   ranks 0 and 1
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt.problems import ConfigError, Problem

MOST_SLOTS = 1024  # of a host; each is held as a number
LINE = re.compile(r"(?P<name>\S+)(?:\s+slots=(?P<slots>\S*))?(?:\s+(?P<rest>.*))?", re.DOTALL)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
NAME_RULE = "is no plain host name (letters, digits, . _ -)"
NAME_FIX = "user, port and address of a host belong into ~/.ssh/config, or into ssh_port and ssh_options"


@dataclass(frozen=True)
class Host:
    """A machine and which of its slots (GPUs) get a rank, in order of rank."""

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Raises ConfigError with every line that is wrong, also where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(Problem("hostfile", str(path), "no such file", _files_beside(path))) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise ConfigError(Problem("hostfile", str(path), f"cannot be read: {error}")) from None
    lines = {f"{path}, line {number}": line for number, line in enumerate(text.splitlines(), start=1)}
    hosts = parse_hosts(lines)
    if not hosts:
        raise ConfigError(Problem("hostfile", str(path), "names no host", "one per line: name slots=8"))
    return hosts


def parse_hosts(lines: Mapping[str, str], *, slots: int | None = None) -> tuple[Host, ...]:
    """Hosts of lines ``name slots=N``, by where each stands. ``slots``: of hosts that state none, where that may be.

    Raises:
        ConfigError: with everything that is wrong.
    """
    found: dict[str, Host] = {}
    problems = []
    for where, line in lines.items():
        stated = line.partition("#")[0].strip()
        if not stated:
            continue
        host = _parse(where, stated, slots)
        if isinstance(host, Problem):
            problems.append(host)
        elif host.name in found:
            problems.append(Problem(where, line, f"{host.name} is named twice"))
        else:
            found[host.name] = host
    if problems:
        raise ConfigError(*problems)
    return tuple(found.values())


def _parse(where: str, line: str, slots: int | None) -> Host | Problem:
    match = LINE.fullmatch(line)
    assert match, "a line that is not blank has a name"
    name, stated, rest = match["name"], match["slots"], match["rest"]
    if not NAME.fullmatch(name):
        return Problem(where, name, NAME_RULE, NAME_FIX)
    if rest or (stated is None and slots is None):
        return Problem(where, line, "must be `name slots=N`", "N ranks run on it: its GPUs, or 1 and more without any")
    number = slots or 0
    if stated is not None:
        is_short = stated.isascii() and stated.isdecimal() and len(stated) <= len(str(MOST_SLOTS))
        number = int(stated) if is_short else 0
    if not 1 <= number <= MOST_SLOTS:
        return Problem(where, line, f"slots must be a whole number from 1 to {MOST_SLOTS:,}")
    if slots is not None and number != slots:
        return Problem(where, line, f"processes_per_host says {slots}", "state one of the two")
    return Host(name, tuple(range(number)))


def choose_hosts(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """The hosts and slots that take part, in the hostfile's order.

    Raises:
        ConfigError: an unknown host or slot, nothing left, or unequal numbers of slots.
    """
    if include and exclude:
        raise ConfigError(Problem("--exclude", exclude, "only one of --include and --exclude can be given"))
    option, spec = ("--include", include) if include else ("--exclude", exclude)
    named = _parse_spec(option, spec, hosts) if spec else {}
    slots_of = {host.name: set(host.slots) for host in hosts}
    if include:
        slots_of = {name: named.get(name, set()) for name in slots_of}
    elif exclude:
        slots_of = {name: slots - named.get(name, set()) for name, slots in slots_of.items()}
    chosen = tuple(Host(host.name, tuple(sorted(slots))) for host in hosts if (slots := slots_of[host.name]))
    if not chosen:
        raise ConfigError(Problem(option, spec, "leaves no host"))
    numbers = {host.name: len(host.slots) for host in chosen}
    if len(set(numbers.values())) > 1:
        fewest = min(numbers.values())
        each = "@".join(f"{host.name}:{','.join(map(str, host.slots[:fewest]))}" for host in chosen)
        fix = f"with as many on each: --include {each}"
        rule = f"slots are unequal ({_counts(numbers)}): DeepSpeed would give ranks the wrong GPUs"
        raise ConfigError(Problem("hosts", None, rule, fix))
    return chosen


def _parse_spec(option: str, spec: str, hosts: Sequence[Host]) -> dict[str, set[int]]:
    """``a@b:0,2`` -> slots by host."""
    known = {host.name: host for host in hosts}
    found: dict[str, set[int]] = {}
    problems = []
    for part in spec.split("@"):
        name, colon, listed = part.partition(":")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(Problem(option, name, "no such host", f"did you mean {close[0]}?" if close else ""))
            continue
        slots = {int(text) for text in listed.split(",") if text.isascii() and text.isdecimal()}
        if colon and (len(slots) != len(listed.split(",")) or not slots <= set(known[name].slots)):
            problems.append(Problem(option, part, f"{name} has the slots {_shown(known[name].slots)}"))
        found.setdefault(name, set()).update(slots if colon else known[name].slots)
    if problems:
        raise ConfigError(*problems)
    return found


def _shown(slots: Sequence[int]) -> str:
    return f"0 to {slots[-1]}" if len(slots) > 1 and slots == tuple(range(len(slots))) else ", ".join(map(str, slots))


def _counts(numbers: Mapping[str, int]) -> str:
    """At most eight of them, the rare ones first: one odd host among many is the one to see."""
    values = list(numbers.values())
    rare = sorted(numbers.items(), key=lambda item: values.count(item[1]))
    return ", ".join(f"{name} {number}" for name, number in rare[:8]) + (", ..." if len(rare) > 8 else "")


def _files_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "without it DeepSpeed would use this machine alone"


def render_hostfile(hosts: Sequence[Host]) -> str:
    """For DeepSpeed: as many slots as the highest that is used needs; ``include_of`` says which."""
    return "".join(f"{host.name} slots={max(host.slots) + 1}\n" for host in hosts)


def include_of(hosts: Sequence[Host]) -> str:
    """DeepSpeed's --include for these slots; empty where they are all that ``render_hostfile`` states."""
    if all(host.slots == tuple(range(len(host.slots))) for host in hosts):
        return ""
    return "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in hosts)
