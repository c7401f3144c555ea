"""A cable that is slow and loses frames, in user space: for kernels without `tc netem`.

    python slow_link.py SWITCH_END HOST_END MILLISECONDS LOSS_PERCENT

Makes two taps in the network namespace it runs in; the host's end can then be moved into the host's. What the host
sends arrives so much later, and some of it never; what it is sent arrives at once, as with netem on its interface.
"""

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
MOST_WAITING = 4096  # frames; a real cable's queue is bounded too


def tap(name: str) -> int:
    """File descriptor of a new tap: whole frames are read and written."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd


def send(fd: int, frame: bytes) -> None:
    try:
        os.write(fd, frame)
    except OSError:  # the other end is down: a cable loses it
        return


def frames(fd: int) -> list[bytes]:
    found = []
    while len(found) < 64:
        try:
            found.append(os.read(fd, 65536))
        except BlockingIOError:
            break
        except OSError:  # this end is down
            time.sleep(0.01)
            break
    return found


def main() -> None:
    switch, host = tap(sys.argv[1]), tap(sys.argv[2])
    delay, loss = float(sys.argv[3]) / 1000, float(sys.argv[4]) / 100
    draw = random.Random(0)
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([switch, host], [], [], timeout)
        now = time.monotonic()
        if switch in ready:
            for frame in frames(switch):
                send(host, frame)
        if host in ready:
            waiting += [(now + delay, frame) for frame in frames(host) if draw.random() >= loss][
                : MOST_WAITING - len(waiting)
            ]
        while waiting and waiting[0][0] <= time.monotonic():
            send(switch, waiting.popleft()[1])


if __name__ == "__main__":
    main()
