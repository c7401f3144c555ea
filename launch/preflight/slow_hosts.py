"""Which host is slow, from what every host measured to its neighbours on a ring.

A ring is as slow as its slowest link, so an all-reduce alone names nobody. A slow host is slow on all of its links,
while its neighbours have a good one on their other side; hence a host is judged by its best link:

    links a-b 100, b-c 10, c-d 10, d-a 100  ->  best a 100, b 100, c 10, d 100  ->  c

Between two hosts there is one link: only where one direction is slow is it known who is to blame, the sender.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

SLOW_FACTOR = 3.0  # hosts of one network differ by less, also while other jobs use it
LATE_SECONDS = 0.010  # there and back; inside a data centre it is below a thousandth
MEGA = 1e6


@dataclass(frozen=True)
class Link:
    """What one host measured to another: its sending, and a small message there and back."""

    bytes_per_second: float
    round_trip_seconds: float


Links = Mapping[str, Mapping[str, Link]]  # by the sending host, then by the receiving one


def best_links(links: Links) -> dict[str, Link]:
    """Of every host: the rate of its best link, both ways, and its shortest round trip."""
    best = {}
    for host, measured in links.items():
        both = [min(link.bytes_per_second, links[other][host].bytes_per_second) for other, link in measured.items()]
        trips = [link.round_trip_seconds for link in measured.values()]
        best[host] = Link(max(both), min(trips))
    return best


def slow_hosts(links: Links) -> dict[str, str]:
    """Why each slow host is one, in words; empty where none is."""
    if len(links) == 2:
        return _slower_of_two(links)
    best = best_links(links)
    usual = median(link.bytes_per_second for link in best.values())
    usual_trip = median(link.round_trip_seconds for link in best.values())
    found = {}
    for host, link in best.items():
        words = []
        if link.bytes_per_second * SLOW_FACTOR < usual:
            words.append(f"{rate(link.bytes_per_second)} on its best link, the others {rate(usual)}")
        if link.round_trip_seconds > max(LATE_SECONDS, SLOW_FACTOR * usual_trip):
            words.append(f"{1e3 * link.round_trip_seconds:.0f} ms there and back, the others {1e3 * usual_trip:.1f} ms")
        if words:
            found[host] = "; ".join(words)
    return found


def late_links(links: Links) -> bool:
    """Every way is long: no host differs from the others, yet all wait."""
    return median(link.round_trip_seconds for link in best_links(links).values()) > LATE_SECONDS


def _slower_of_two(links: Links) -> dict[str, str]:
    sending = {host: next(iter(measured.values())).bytes_per_second for host, measured in links.items()}
    (slow, low), (_, high) = sorted(sending.items(), key=lambda item: item[1])
    return {slow: f"sends {rate(low)}, and is sent {rate(high)}"} if low * SLOW_FACTOR < high else {}


def rate(bytes_per_second: float) -> str:
    """``118 MB/s``."""
    return (
        f"{bytes_per_second / MEGA:,.0f} MB/s"
        if bytes_per_second >= 10 * MEGA
        else f"{bytes_per_second / MEGA:.2g} MB/s"
    )
