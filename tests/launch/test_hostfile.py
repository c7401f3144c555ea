"""Which hosts take part: hostfiles and --include/--exclude, against DeepSpeed's own reading of both."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.problems import ConfigError
from launch.hostfile import Host, choose_hosts, include_of, parse_hosts, read_hostfile, render_hostfile

FOUR = tuple(Host(name, (0, 1, 2, 3)) for name in ("a", "b", "c"))


def refusal(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return str(caught.value)


def test_a_hostfile_gives_hosts_in_its_order_and_may_hold_comments(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two machines\n\nnode2 slots=2  # the fast one\nnode1   slots=2\n")
    assert read_hostfile(path) == (Host("node2", (0, 1)), Host("node1", (0, 1)))


def test_a_hostfile_that_is_not_there_is_an_error_and_the_like_of_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "hostfile").touch()
    assert "no such file; did you mean" in refusal(read_hostfile, tmp_path / "hostfil")
    assert "this machine alone" in refusal(read_hostfile, tmp_path / "x")
    assert "names no host" in refusal(read_hostfile, tmp_path / "hostfile")


def test_every_wrong_line_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\na slots=2\nb slots=two\nc\nd slots=0\ne slots=2 more\nf slots=\n")
    told = refusal(read_hostfile, path).splitlines()
    assert [line.split(": ")[0].split(",")[-1].split(" = ")[0] for line in told] == [f" line {n}" for n in range(2, 8)]
    assert "named twice" in told[0] and "whole number" in told[1] and "must be `name slots=N`" in told[2]


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "me@host", "a,b", "n[1-4]", "^file", "a;b", "$(x)", "a%h", "::1"])
def test_names_that_mean_something_to_ssh_pdsh_or_a_shell_are_refused(name: str) -> None:
    assert "is no plain host name" in refusal(parse_hosts, {"hosts.0": f"{name} slots=1"})


def test_hosts_without_slots_take_processes_per_host_and_must_not_contradict_it() -> None:
    assert parse_hosts({"hosts.0": "a", "hosts.1": "b slots=2"}, slots=2) == (Host("a", (0, 1)), Host("b", (0, 1)))
    assert "processes_per_host says 2" in refusal(parse_hosts, {"hosts.0": "a slots=3"}, slots=2)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, {"a": 4, "b": 4, "c": 4}),
        ({"include": "c@a"}, {"a": 4, "c": 4}),
        ({"include": "a:1,3@b:0,2"}, {"a": 2, "b": 2}),
        ({"exclude": "b"}, {"a": 4, "c": 4}),
        ({"exclude": "a:0@b:1@c:2"}, {"a": 3, "b": 3, "c": 3}),
    ],
)
def test_include_and_exclude_keep_the_order_of_the_hostfile(options: dict[str, str], chosen: dict[str, int]) -> None:
    assert {host.name: len(host.slots) for host in choose_hosts(FOUR, **options)} == chosen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": "a", "exclude": "b"}, "only one of"),
        ({"include": "aa"}, "no such host; did you mean a?"),
        ({"include": "a:4"}, "a has the slots 0 to 3"),
        ({"include": "a:x"}, "a has the slots 0 to 3"),
        ({"exclude": "a@b@c"}, "leaves no host"),
        ({"exclude": "a:0"}, "a 3, b 4, c 4"),
    ],
)
def test_what_cannot_be_chosen_is_told(options: dict[str, str], words: str) -> None:
    assert words in refusal(choose_hosts, FOUR, **options)


def test_unequal_slots_are_refused_with_the_choice_that_makes_them_equal() -> None:
    hosts = (Host("a", (0, 1, 2, 3)), Host("b", (0, 1)))
    told = refusal(choose_hosts, hosts)
    assert told.endswith("--include a:0,1@b:0,1")
    assert [host.slots for host in choose_hosts(hosts, include="a:0,1@b:0,1")] == [(0, 1), (0, 1)]


def deepspeed_reads(hostfile: str, include: str) -> dict[str, list[int]]:
    """runner.fetch_hostfile and parse_inclusion_exclusion of DeepSpeed 0.19.8, in short; it imports torch."""
    pool = {line.split()[0]: list(range(int(line.split("=")[1]))) for line in hostfile.splitlines()}
    if not include:
        return pool
    wanted = {part.split(":")[0]: sorted(map(int, part.split(":")[1].split(","))) for part in include.split("@")}
    assert all(set(slots) <= set(pool[name]) for name, slots in wanted.items())
    return {name: wanted[name] for name in pool if name in wanted}


@given(
    st.integers(1, 4).flatmap(
        lambda number: st.lists(st.sets(st.integers(0, 9), min_size=number, max_size=number), min_size=1, max_size=5)
    )
)
def test_deepspeed_is_told_exactly_the_slots_that_were_chosen(slots: list[set[int]]) -> None:
    hosts = tuple(Host(f"n{number}", tuple(sorted(each))) for number, each in enumerate(slots))
    read = deepspeed_reads(render_hostfile(hosts), include_of(hosts))
    assert list(read.items()) == [(host.name, list(host.slots)) for host in hosts]


@pytest.mark.parametrize("line", ["a b\nc", "a\nb slots=2", "a slots=2 b\nc", "a\x0bb\x0bc d\ne"])
def test_a_line_with_a_line_break_in_it_is_a_problem_and_no_traceback(line: str) -> None:
    assert "hosts.0" in refusal(parse_hosts, {"hosts.0": line}, slots=2)


def test_a_name_that_no_file_can_have_is_a_problem_and_no_traceback() -> None:
    assert "cannot be read" in refusal(read_hostfile, Path("a\0b"))


@pytest.mark.parametrize("number", ["1025", "10000000000", "9" * 5000])
def test_a_number_of_slots_that_no_host_has_is_refused_and_not_counted_out(number: str) -> None:
    assert "from 1 to 1,024" in refusal(parse_hosts, {"hosts.0": f"a slots={number}"})
    if len(number) < 100:
        assert "from 1 to 1,024" in refusal(parse_hosts, {"hosts.0": "a"}, slots=int(number))
