"""The slow host is named, and its neighbours, which are slow towards it, are not."""

from hypothesis import given
from hypothesis import strategies as st

from launch.preflight.bandwidth import rounds
from launch.preflight.slow_hosts import Link, late_links, rate, slow_hosts

FAST, QUICK = 1e9, 2e-4


def ring(
    num_hosts: int, slow: int | None = None, *, factor: float = 10.0, delay: float = 0.0
) -> dict[str, dict[str, Link]]:
    """Links of a ring as measured, where those of one host are slower, or longer, both ways."""
    links: dict[str, dict[str, Link]] = {f"n{host}": {} for host in range(num_hosts)}
    for pairs in rounds(num_hosts):
        for a, b in pairs:
            ill = slow in (a, b)
            link = Link(FAST / factor if ill else FAST, QUICK + delay if ill else QUICK)
            links[f"n{a}"][f"n{b}"] = links[f"n{b}"][f"n{a}"] = link
    return links


@given(num_hosts=st.integers(3, 70), data=st.data())
def test_a_slow_host_among_any_number_is_the_one_that_is_named(num_hosts: int, data: st.DataObject) -> None:
    slow = data.draw(st.integers(0, num_hosts - 1))
    assert list(slow_hosts(ring(num_hosts, slow))) == [f"n{slow}"]
    assert list(slow_hosts(ring(num_hosts, slow, factor=1.0, delay=0.02))) == [f"n{slow}"]
    assert not slow_hosts(ring(num_hosts)) and not slow_hosts(ring(num_hosts, slow, factor=2.0))


def test_the_words_say_by_how_much() -> None:
    words = slow_hosts(ring(4, 2, delay=0.02))["n2"]
    assert words == "100 MB/s on its best link, the others 1,000 MB/s; 20 ms there and back, the others 0.2 ms"


def test_of_two_hosts_the_one_that_sends_slowly_is_named_and_otherwise_neither() -> None:
    both = {"a": {"b": Link(2e6, 0.02)}, "b": {"a": Link(3e8, 0.02)}}
    assert slow_hosts(both) == {"a": "sends 2 MB/s, and is sent 300 MB/s"}
    alike = {"a": {"b": Link(2e6, 0.02)}, "b": {"a": Link(3e6, 0.02)}}
    assert not slow_hosts(alike) and late_links(alike)
    assert not late_links(ring(4)) and not late_links(ring(4, 1, delay=0.02))


@given(num_hosts=st.integers(2, 70))
def test_in_no_round_has_a_host_two_links_and_all_of_the_ring_is_measured(num_hosts: int) -> None:
    for pairs in rounds(num_hosts):
        busy = [host for pair in pairs for host in pair]
        assert len(busy) == len(set(busy))
    measured = {frozenset(pair) for pairs in rounds(num_hosts) for pair in pairs}
    assert measured == {frozenset((host, (host + 1) % num_hosts)) for host in range(num_hosts)}
    assert len(rounds(num_hosts)) <= 3 and rounds(1) == []


def test_rates_are_told_in_megabytes() -> None:
    assert [rate(118e6), rate(2.5e6), rate(12.4e9)] == ["118 MB/s", "2.5 MB/s", "12,400 MB/s"]
