"""Run folders of a few bytes for tests of watchers: real checkpoints, and an evaluation that reads their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def suite_record(step: int, accuracy: float | None, *, weights_hash: str | None = "w") -> Any:
    """A record of the suite ``tiny``: one task, in one group."""
    from cpt.eval.results import Measured, SuiteRecord, TaskResult, group_scores

    task = TaskResult(
        group="general", kind="cloze", metric="acc", higher_is_better=True, value=accuracy, stderr=0.01,
        metrics={"acc": Measured(accuracy, 0.01)}, items=10, truncated=0, overlapping=0,
        value_without_overlap=accuracy, stderr_without_overlap=0.01, few_shot=0, task_hash="t", seconds=0.1,
    )  # fmt: skip
    return SuiteRecord(
        suite="tiny", suite_hash="s", step=step, tokens_seen=8 * step, weights_hash=weights_hash, tokenizer="none",
        dtype="fp32", harness="none", tasks={"one": task}, groups=group_scores({"one": task}),
    )  # fmt: skip


class TinyRun:
    """A run folder whose checkpoints hold one number; its ``accuracy`` by the suite ``tiny`` is that number."""

    def __init__(self, root: Path) -> None:
        from cpt.rundir import RunDir

        self.rundir = RunDir(root)
        self.results = self.rundir.evals / "tiny"
        self.evaluated: list[int] = []
        self.rundir.checkpoints.mkdir(parents=True)
        self.rundir.config.write_text("train: {}\n")
        self.rundir.plan.write_text("{}")

    def save(self, step: int, accuracy: float = 0.5) -> Path:
        """A complete, full checkpoint."""
        import numpy as np
        from safetensors.numpy import save_file

        from cpt.checkpoint.marker import FileFacts, content_hash, write_marker

        folder = self.rundir.checkpoint(step)
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text('{"run_config": {"run": {"name": "tiny"}}}')
        for part, kind in (("param", "param"), ("state", "exp_avg")):
            tensors = {f"{kind}|0|w": np.array([accuracy, accuracy], np.float32)}
            save_file(tensors, folder / f"shard_00000-of-00001.{part}.safetensors")
        files = {path.name: FileFacts(path.stat().st_size, content_hash(path)) for path in sorted(folder.iterdir())}
        write_marker(folder, files)
        return folder

    def event(self, name: str, step: int) -> None:
        from cpt.rundir import note_event

        note_event(name, step, self.rundir)

    def evaluate(self, checkpoint: Path) -> None:
        """What a watcher calls; writes beside the run that the checkpoint lies in."""
        from safetensors.numpy import load_file

        from cpt.checkpoint.marker import read_marker
        from cpt.eval.results import record_file, write_suite_record
        from cpt.rundir import step_of

        step = step_of(checkpoint) or 0
        files = read_marker(checkpoint)
        name = "shard_00000-of-00001.param.safetensors"
        accuracy = float(load_file(checkpoint / name)["param|0|w"].mean())
        results = checkpoint.parent.parent / "evals" / "tiny"
        record = suite_record(step, accuracy, weights_hash=files[name].xxh3_128)
        write_suite_record(record_file(results, step), record)
        self.evaluated.append(step)


@pytest.fixture
def tiny_run(tmp_path: Path) -> TinyRun:
    """An empty run folder."""
    return TinyRun(tmp_path / "run")


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Any]:
    """Builds a record of the suite ``tiny`` from a step and an accuracy."""
    return suite_record
