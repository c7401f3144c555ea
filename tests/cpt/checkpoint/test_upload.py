"""Copies elsewhere: whole ones only, marker last, no copy twice, and no failure of theirs ends a run."""

import json
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from cpt.checkpoint import upload
from cpt.checkpoint.marker import reduce_to_weights
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta, Fragment
from cpt.checkpoint.upload import Uploader, copy_checkpoint, missing_driver
from cpt.checkpoint.writing import finish_checkpoint, start_checkpoint, write_shard
from cpt.rundir import step_name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints", 5)


def save(root: Path, step: int, value: float = 1.0) -> Path:
    folder, meta = root / step_name(step), CheckpointMeta(step, 9, {}, step, 0, "f", {"w": [2]}, {}, {}, {})
    start_checkpoint(folder, 100)
    state = {kind: torch.full((2,), value) for kind in ("param", "exp_avg")}
    finish_checkpoint(folder, meta, [write_shard(folder, [Fragment("w", 0, state)], rank=0, world_size=1)])
    return folder


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/far" if request.param == "file" else f"memory://{tmp_path.name}"


def wait_for(uploader: Uploader) -> list[upload.Upload]:
    assert uploader.finish(timeout=10.0)
    return uploader.poll()


def names_at(url: str) -> set[str]:
    filesystem, root = fsspec.url_to_fs(url)
    return {Path(path).name for path in filesystem.find(root)}


def test_a_checkpoint_is_copied_whole_and_not_a_second_time(folder: Path, url: str) -> None:
    uploader = Uploader(url, "demo")
    uploader.add(folder)
    (done,) = wait_for(uploader)
    assert done.error is None and done.bytes > 0 and done.url == f"{url}/demo/{folder.name}"
    assert names_at(done.url) == {path.name for path in folder.iterdir()}
    again = Uploader(url, "demo")  # as after a resume
    again.add(folder)
    assert [(item.bytes, item.error) for item in wait_for(again)] == [(0, None)]


def test_a_copy_is_a_checkpoint_that_can_be_read(folder: Path, tmp_path: Path) -> None:
    copy_checkpoint(folder, str(tmp_path / "far"))
    assert Checkpoint.open(tmp_path / "far").verify() == []


def test_a_copy_that_was_cut_short_is_made_again_and_one_of_another_run_replaced(folder: Path, url: str) -> None:
    copy_checkpoint(folder, url)
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.rm_file(f"{root}/COMPLETE")
    assert copy_checkpoint(folder, url) > 0
    assert copy_checkpoint(save(folder.parent, 5, value=2.0), url) > 0
    assert json.loads(filesystem.cat_file(f"{root}/COMPLETE")) == json.loads((folder / "COMPLETE").read_text())


def test_a_checkpoint_that_was_reduced_here_leaves_the_full_copy_there(folder: Path, url: str) -> None:
    copy_checkpoint(folder, url)
    reduce_to_weights(folder)
    assert copy_checkpoint(folder, url) == 0
    assert any(".state." in name for name in names_at(url))


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Let the first ``times`` copies of a file to memory:// fail."""
    tried: list[str] = []
    real = MemoryFileSystem.put_file

    def put_file(self: Any, local: str, remote: str, **options: Any) -> Any:
        tried.append(Path(local).name)
        if len(tried) <= times:
            raise ConnectionError("network is down")
        return real(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    return tried


def test_a_copy_that_fails_is_tried_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing(monkeypatch, 2)
    uploader = Uploader(f"memory://{tmp_path.name}", "demo", retry_seconds=(0.0, 0.0))
    uploader.add(folder)
    (done,) = wait_for(uploader)
    assert done.error is None and len(tried) == 2 + len(list(folder.iterdir())) - 1


def test_a_copy_that_keeps_failing_is_reported_and_the_next_one_is_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 3)
    uploader = Uploader(f"memory://{tmp_path.name}", "demo", retry_seconds=(0.0, 0.0))
    uploader.add(folder)
    uploader.add(save(folder.parent, 6))
    first, second = wait_for(uploader)
    assert first.error == "ConnectionError: network is down" and second.error is None
    assert not names_at(first.url)


def test_a_checkpoint_that_was_given_up_meanwhile_is_reported_without_trying_again(tmp_path: Path, url: str) -> None:
    uploader = Uploader(url, "demo", retry_seconds=(60.0,))
    uploader.add(tmp_path / step_name(5))
    (done,) = wait_for(uploader)
    assert done.error is not None and "no such checkpoint folder" in done.error


@pytest.mark.parametrize(("timeout", "asked"), [(0.1, False), (60.0, True)])
def test_the_end_of_a_run_waits_no_longer_than_it_says_or_until_it_is_asked_to_stop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: float, asked: bool
) -> None:
    failing(monkeypatch, 99)
    uploader = Uploader(f"memory://{tmp_path.name}", "demo", retry_seconds=(60.0,))
    uploader.add(folder)
    started = time.monotonic()
    while not uploader.busy:
        time.sleep(0.01)
    assert uploader.busy == {5}
    assert not uploader.finish(timeout=timeout, should_stop=lambda: asked) and time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://bucket/runs", "s3fs"),
        ("nowhere://bucket", "Protocol not known: nowhere"),
        ("memory://x", None),
        ("/x", None),
    ],
)
def test_a_url_without_a_driver_is_known_before_anything_starts(url: str, told: str | None) -> None:
    if url.startswith("s3"):
        pytest.importorskip("fsspec")
        try:
            import s3fs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("the driver is installed here")
    found = missing_driver(url)
    assert found is None if told is None else told in str(found)
