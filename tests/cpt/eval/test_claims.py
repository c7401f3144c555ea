"""A checkpoint has one evaluator at a time, and none of them keeps it when it dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from cpt import folder_lock
from cpt.eval import claims
from cpt.eval.claims import UrlClaims, claim, holder_of, lock_file, steps_being_evaluated
from cpt.folder_lock import LINE_BYTES, read_holder

ROOT = Path(claims.__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(claims, "CONFIRM_SECONDS", 0.0)
    monkeypatch.setattr(claims, "URL_BEAT_SECONDS", 0.01)
    monkeypatch.setattr(claims, "URL_CONFIRM_SECONDS", 0.0)
    monkeypatch.setattr(claims, "URL_PATIENCE_SECONDS", 0.1)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "evals" / "tiny"


def elsewhere(results: Path, step: int) -> Path:
    """Claimed by a process of another machine, which says nothing more."""
    path = lock_file(results, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = {"host": "far-away", "pid": 4711, "since": "2031-01-01 00:00:00Z", "machine": "another kernel", "beat": 0}
    path.write_text(f"{json.dumps(holder):<{LINE_BYTES - 1}}\n")
    return path


def test_one_has_it_and_the_other_does_not_until_it_is_given_back(results: Path) -> None:
    first = claim(results, 5)
    assert first is not None and claim(results, 5) is None
    holder = holder_of(results, 5)
    assert holder is not None and holder.pid == os.getpid()
    with first:
        other = claim(results, 6)
        assert other is not None
        other.close()
    assert holder_of(results, 5) is None
    again = claim(results, 5)
    assert again is not None
    again.close()


def test_a_killed_evaluator_holds_nothing(results: Path) -> None:
    program = f"from pathlib import Path; from cpt.eval.claims import claim; import os; claim(Path({str(results)!r}), 5); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False).returncode == 9
    left = holder_of(results, 5)
    assert left is not None and left.pid != os.getpid()
    assert steps_being_evaluated(results.parent, [5]) == set()
    taken = claim(results, 5)
    assert taken is not None
    taken.close()


def test_a_claim_that_another_host_wrote_at_the_same_moment_is_left_to_it(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "CONFIRM_SECONDS", 0.01)
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 60.0)
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: elsewhere(results, 5))  # where flock does not reach
    assert claim(results, 5) is None
    assert read_holder(lock_file(results, 5)) is not None  # the other's, untouched


def test_retention_spares_what_is_being_evaluated_for_as_long_as_its_evaluator_lives(results: Path) -> None:
    held = claim(results, 5)
    given_back = claim(results, 6)
    assert held is not None and given_back is not None
    given_back.close()
    elsewhere(results, 7)  # dead: says nothing new
    assert steps_being_evaluated(results.parent, [5, 6, 7, 8]) == {5}
    held.close()
    assert steps_being_evaluated(results.parent, [5, 6, 7, 8]) == set()


def test_any_suite_counts_and_other_steps_are_not_waited_for(results: Path) -> None:
    elsewhere(results, 7)
    other = claim(results.with_name("other"), 5)
    assert other is not None
    with other:
        started = time.monotonic()
        assert steps_being_evaluated(results.parent, [5, 6]) == {5}
        assert time.monotonic() - started < folder_lock.PATIENCE_SECONDS


@pytest.fixture
def far(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/claims"


def at_url(url: str) -> UrlClaims:
    filesystem, path = fsspec.url_to_fs(url)
    return UrlClaims(filesystem, path)


def test_at_a_url_one_has_it_and_gives_it_back(far: str) -> None:
    mine, theirs = at_url(far), at_url(far)
    held = mine.claim(5)
    assert held is not None
    for _ in range(30):  # it says something new all the while
        assert theirs.claim(5) is None
        time.sleep(0.01)
    held.close()
    taken = theirs.claim(5)
    assert taken is not None and taken.is_held
    taken.close()


def test_at_a_url_a_silent_evaluator_is_taken_over_once_it_was_watched_for_long_enough(far: str) -> None:
    filesystem, path = fsspec.url_to_fs(far)
    filesystem.pipe_file(f"{path}/step_00000005.json", b'{"host": "far-away", "nonce": "x", "beat": 3}')
    mine = at_url(far)
    assert mine.claim(5) is None
    deadline = time.monotonic() + 10
    while (held := mine.claim(5)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.close()


def test_at_a_url_the_last_of_two_writers_has_it(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "URL_BEAT_SECONDS", 60.0)
    filesystem, path = fsspec.url_to_fs(far)
    other = b'{"host": "far-away", "nonce": "x", "beat": 0}'
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: filesystem.pipe_file(f"{path}/step_00000005.json", other))
    assert at_url(far).claim(5) is None
    assert filesystem.cat_file(f"{path}/step_00000005.json") == other


def test_at_a_url_a_claim_that_could_not_be_confirmed_is_given_back(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seconds: float) -> None:
        raise OSError("the URL does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(claims.time, "sleep", fail)
        with pytest.raises(OSError, match="does not answer"):
            at_url(far).claim(5)
    taken = at_url(far).claim(5)  # else its sign of life would go on, and nobody ever have it
    assert taken is not None
    taken.close()


def test_what_is_no_claim_holds_nobody_off_at_a_url(far: str) -> None:
    filesystem, path = fsspec.url_to_fs(far)
    filesystem.pipe_file(f"{path}/step_00000005.json", b"[")
    held = at_url(far).claim(5)
    assert held is not None
    held.close()
