"""Results come in the order of the jobs; a worker that dies is an error that says so."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_tools.tokenizing import crew
from data_tools.tokenizing.crew import in_order
from data_tools.tokenizing.documents import Encoded, Halves
from data_tools.tokenizing.jobs import Job, Piece


def job(texts: list[bytes], piece: Piece | None = None) -> Job:
    return Job(texts, piece, 0, 0, 0, False, 0, [])


def spell(texts: Sequence[bytes], piece: Piece | None) -> Halves:
    """Bytes as tokens; texts that start with a capital are held out; two of them are deadly."""
    halves: tuple[list[bytes], list[bytes]] = ([], [])
    for text in texts:
        if text == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        assert text != b"fail", "told to"
        halves[piece.side if piece else text[:1].isupper()].append(text)
    return half(halves[0]), half(halves[1])


def half(texts: list[bytes]) -> Encoded:
    tokens = np.frombuffer(b"".join(texts), np.uint8).astype(np.uint16)
    return Encoded(tokens, np.array([len(text) for text in texts], np.int64), len(tokens))


def spelled(jobs: list[Job], workers: int) -> list[tuple[list[bytes], list[list[int]], int]]:
    found = []
    for job_, halves in in_order(iter(jobs), spell, workers):
        rows = [part.tokens.tolist() for part in halves]
        found.append((job_.texts, rows, sum(int(part.lengths.sum()) for part in halves)))
    return found


def test_any_number_of_workers_gives_the_same_results_in_order() -> None:
    jobs = [job([b"text %d" % i, b"Held %d" % i] * (i % 7)) for i in range(40)]
    jobs[11] = job([b"piece"], Piece(1, True, False))
    assert spelled(jobs, 1) == spelled(jobs, 2) == spelled(jobs, 3)


def test_a_text_that_fits_no_slot_is_done_in_this_process() -> None:
    jobs = [job([b"a"]), job([b"b" * (crew._TEXT_BYTES + 1)]), job([b"c"])]
    assert spelled(jobs, 2) == spelled(jobs, 1)


def test_replaced_workers_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_RECYCLE_BYTES", 10)
    jobs = [job([b"text %d" % i]) for i in range(30)]
    assert spelled(jobs, 2) == spelled(jobs, 1)


def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    jobs = [job([b"a"]), job([b"die"]), *(job([b"b"]) for _ in range(20))]
    with pytest.raises(RuntimeError, match=r"worker \d+ was killed by signal 9 \(Killed\); if memory was short"):
        spelled(jobs, 2)


def test_an_error_in_a_worker_arrives_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"worker failed:(.|\n)*AssertionError: told to"):
        spelled([job([b"fail"])], 2)


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_no_worker_is_left_behind_and_none_keeps_a_file_open(tmp_path: Path) -> None:
    def list_open_files(texts: Sequence[bytes], piece: Piece | None) -> Halves:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return half([os.readlink(link).encode() for link in links if os.path.exists(link)]), half([])

    before = children()
    with (tmp_path / "open").open("w") as file:
        ((_, (found, _)),) = list(in_order(iter([job([b"x"])]), list_open_files, 2))
        assert file.name not in found.tokens.astype(np.uint8).tobytes().decode()
    assert children() <= before


def test_a_reader_that_fails_ends_the_workers() -> None:
    def jobs() -> Iterator[Job]:
        yield job([b"a"])
        raise ValueError("bad line")

    with pytest.raises(ValueError, match="bad line"):
        list(in_order(jobs(), spell, 2))
