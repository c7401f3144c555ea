"""A run under a URL: what it takes to evaluate it comes here, results go there, and nothing else changes there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from cpt.eval import claims
from cpt.eval.remote_run import RemoteRun
from cpt.eval.tries import read_failures
from cpt.eval.watch import Outcome, Pace, Work, watch
from cpt.problems import ConfigError
from cpt.rundir import DataError, step_name

TinyRun = Any  # of conftest.py
QUICK = Pace(poll_seconds=0.01, retry_seconds=(0.01, 0.01), still_seconds=0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "URL_CONFIRM_SECONDS", 0.0)


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    there = f"file://{tmp_path}/far" if request.param == "file" else f"memory://{tmp_path.name}"
    yield there
    filesystem, root = fsspec.url_to_fs(there)
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


def send(run: TinyRun, url: str, *, under: str = "") -> None:
    filesystem, root = fsspec.url_to_fs(url)
    for path in sorted(run.rundir.root.rglob("*")):
        if path.is_file():
            there = f"{root}/{path.relative_to(run.rundir.root / under).as_posix()}"
            filesystem.makedirs(there.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(path), there)


def names_at(url: str) -> set[str]:
    filesystem, root = fsspec.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/") for path in filesystem.find(root)}


def run_watch(run: TinyRun, url: str, scratch: Path, **work: Any) -> Outcome:
    evaluate = work.pop("evaluate", run.evaluate)
    return watch(RemoteRun(url, "tiny", scratch), Work(evaluate, **work), once=True, pace=QUICK)


def test_results_go_there_and_weights_do_not_stay_here(tiny_run: TinyRun, url: str, tmp_path: Path) -> None:
    for step in (5, 10):
        tiny_run.save(step, step / 16)
    tiny_run.event("finish", 10)
    send(tiny_run, url)
    before = names_at(url)
    outcome = run_watch(tiny_run, url, tmp_path / "scratch")
    assert outcome.evaluated == [10, 5] and tiny_run.evaluated == [10, 5]
    assert names_at(url) - before == {f"evals/tiny/{step_name(step)}.json" for step in (5, 10)}
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))
    filesystem, root = fsspec.url_to_fs(url)
    record = json.loads(filesystem.cat_file(f"{root}/evals/tiny/{step_name(10)}.json"))
    assert record["groups"]["general"]["accuracy"] == 0.625
    assert run_watch(tiny_run, url, tmp_path / "another").evaluated == []  # another host, later


def test_only_weights_are_fetched_and_checked(tiny_run: TinyRun, url: str, tmp_path: Path) -> None:
    tiny_run.save(5)
    send(tiny_run, url)
    seen = []

    def evaluate(folder: Path) -> None:
        seen.extend(path.name for path in folder.iterdir())
        tiny_run.evaluate(folder)

    run_watch(tiny_run, url, tmp_path / "scratch", evaluate=evaluate)
    assert sorted(seen) == ["COMPLETE", "meta.json", "shard_00000-of-00001.param.safetensors"]


def test_what_upload_to_makes_is_a_run_too(tiny_run: TinyRun, url: str, tmp_path: Path) -> None:
    tiny_run.save(5)
    tiny_run.rundir.config.unlink()
    tiny_run.rundir.plan.unlink()
    send(tiny_run, url, under="checkpoints")
    scratch = tmp_path / "scratch"
    assert run_watch(tiny_run, url, scratch).evaluated == [5]
    assert yaml.safe_load((scratch / "config.yaml").read_text()) == {"run": {"name": "tiny"}}
    assert f"evals/tiny/{step_name(5)}.json" in names_at(url)


def test_a_half_copied_checkpoint_is_not_fetched(tiny_run: TinyRun, url: str, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        tiny_run.save(step)
    (tiny_run.rundir.checkpoint(5) / "COMPLETE").unlink()
    (tiny_run.rundir.checkpoint(10) / "shard_00000-of-00001.param.safetensors").write_bytes(b"")
    (tiny_run.rundir.checkpoint(15) / "COMPLETE").write_text('{"meta.json": ')
    send(tiny_run, url)
    outcome = run_watch(tiny_run, url, tmp_path / "scratch")
    assert outcome.evaluated == [] and sorted(outcome.partial) == [5, 10, 15]
    assert "1 of 4 files" in outcome.partial[10]


def test_content_that_is_not_what_was_promised_is_a_failure_and_noted_there(
    tiny_run: TinyRun, url: str, tmp_path: Path
) -> None:
    shard = tiny_run.save(5) / "shard_00000-of-00001.param.safetensors"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    send(tiny_run, url)
    outcome = run_watch(tiny_run, url, tmp_path / "scratch")
    assert outcome.failed[5].tries == 3 and "damaged" in outcome.failed[5].reason
    assert f"evals/tiny/failed/{step_name(5)}.json" in names_at(url)
    other = tmp_path / "another"
    assert run_watch(tiny_run, url, other).failed == outcome.failed == read_failures(other / "evals" / "tiny")


def test_what_could_not_be_sent_is_sent_later_without_a_second_evaluation(
    tiny_run: TinyRun, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.save(5)
    send(tiny_run, url)
    filesystem, _ = fsspec.url_to_fs(url)
    real, broken = type(filesystem).put_file, [2]

    def put_file(self: Any, here: str, there: str, **options: Any) -> None:
        if there.endswith("step_00000005.json") and "failed" not in there and broken[0]:
            broken[0] -= 1
            raise ValueError("the driver's own kind of error")
        real(self, here, there, **options)

    monkeypatch.setattr(type(filesystem), "put_file", put_file)
    assert run_watch(tiny_run, url, tmp_path / "scratch").evaluated == [5]
    assert tiny_run.evaluated == [5] and broken == [0]
    assert not [name for name in names_at(url) if "failed" in name]


def test_results_that_were_deleted_there_are_measured_again(tiny_run: TinyRun, url: str, tmp_path: Path) -> None:
    tiny_run.save(5)
    send(tiny_run, url)
    run_watch(tiny_run, url, tmp_path / "scratch")
    run = RemoteRun(url, "tiny", tmp_path / "another")
    assert run.look().evaluated == {5}
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.rm_file(f"{root}/evals/tiny/{step_name(5)}.json")
    assert run.look().evaluated == set() and not run.has_unsent(5)
    assert watch(run, Work(tiny_run.evaluate), once=True, pace=QUICK).evaluated == [5]
    assert tiny_run.evaluated == [5, 5]


@pytest.mark.parametrize("content", [b"", b'{"format_version": 0}'])
def test_results_there_that_cannot_be_read_are_written_anew(
    tiny_run: TinyRun, url: str, tmp_path: Path, content: bytes
) -> None:
    tiny_run.save(5)
    record = tiny_run.results / f"{step_name(5)}.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(content)
    send(tiny_run, url)
    assert run_watch(tiny_run, url, tmp_path / "scratch").evaluated == [5]
    assert run_watch(tiny_run, url, tmp_path / "another").evaluated == []


def test_two_watchers_of_one_url_share_the_work(tiny_run: TinyRun, url: str, tmp_path: Path) -> None:
    tiny_run.save(5)
    send(tiny_run, url)
    first, second = (RemoteRun(url, "tiny", tmp_path / name) for name in ("a", "b"))
    held = first.claim(5)
    assert held is not None and second.is_claimed(5) and second.claim(5) is None
    with held:
        pass
    assert not second.is_claimed(5)


@pytest.mark.parametrize("name", ["../../escaped.json", "/escaped"])
def test_a_name_that_leaves_the_scratch_folder_is_refused(
    tiny_run: TinyRun, url: str, tmp_path: Path, name: str
) -> None:
    folder = tiny_run.save(5)
    marker = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps({**marker, name: {"bytes": 2, "xxh3_128": "0" * 32}}))
    send(tiny_run, url)
    run = RemoteRun(url, "tiny", tmp_path / "scratch")
    with pytest.raises((DataError, OSError)), run.bring(5):
        pass
    assert not (tmp_path / "escaped.json").exists() and not Path("/escaped").exists()


def test_what_is_no_run_and_what_has_no_driver_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        RemoteRun(url, "tiny", tmp_path / "scratch")
    with pytest.raises(ConfigError, match="nowhere"):
        RemoteRun("nowhere://bucket/run", "tiny", tmp_path / "scratch")


def test_an_end_is_seen_there(tiny_run: TinyRun, url: str, tmp_path: Path) -> None:
    tiny_run.save(5)
    tiny_run.event("finish", 5)
    send(tiny_run, url)
    run = RemoteRun(url, "tiny", tmp_path / "scratch")
    assert watch(run, Work(tiny_run.evaluate), pace=QUICK).evaluated == [5]
    assert run.look().all_arrived
