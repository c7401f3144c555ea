"""How hosts ended, by their ssh or by pdsh; and that their output is read whatever becomes of ours."""

import errno
import io
import sys
import time

import pytest

from launch.hosts.voice import PDSH_SAYS, HostEnd, Voice, judge


@pytest.mark.parametrize(
    ("ends", "told", "words"),
    [
        ([("a", 0), ("b", 0)], 0, ""),
        ([("a", 0), ("b", 143)], 143, ""),
        ([("b", 3), ("a", 1)], 3, "host b ended with exit code 3"),
        ([("b", 3), ("a", 2)], 2, "host a ended with exit code 2"),
        ([("a", 3), ("b", 247)], 137, "host b"),  # a fell over the loss of b
        ([("a", 3), ("b", 255)], 3, "lost: host b"),
        ([("a", 143), ("b", 255)], 3, "lost: host b"),
        ([("a", 247)], 137, "host a ended with exit code 137"),  # DeepSpeed of a rank that SIGKILL ended
        ([("a", 241)], 3, "host a"),  # SIGTERM, and nothing was saved
    ],
)
def test_of_all_hosts_ends_the_one_that_tells_why(ends: list[tuple[str, int]], told: int, words: str) -> None:
    end = judge([HostEnd(host, code, at) for at, (host, code) in enumerate(ends)])
    assert end.told == told and words in end.words


def test_pdsh_tells_how_each_host_ended() -> None:
    said = PDSH_SAYS.match("pdsh@login: node-1.x: ssh exited with exit code 247\n")
    assert said and said.groups() == ("node-1.x", "247")


class Broken(io.StringIO):
    """A terminal that has gone, or a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_ranks_are_listened_to_though_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else their next line would not fit into the pipe, and they would wait for ever."""
    monkeypatch.setattr(sys, "stdout", Broken())
    program = "for number in range(20000): print('a line of a rank', number)"
    voice = Voice([sys.executable, "-c", program], None, Broken(), "a")
    try:
        deadline = time.monotonic() + 20
        while not voice.poll():
            assert time.monotonic() < deadline, "it waits for a reader"
            time.sleep(0.02)
        assert voice.final_ends()[0].code == 0
    finally:
        voice.close()
    assert capfd.readouterr().err.count("No space left on device; the job goes on") == 2  # terminal and log, once each
