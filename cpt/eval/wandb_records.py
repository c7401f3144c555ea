"""A suite's results sent to Weights & Biases, as the run itself sends its losses: where ``log.wandb`` says. No torch.

Online, and once the training has ended, they go into the run's own wandb run; two processes that write into one at a
time would take each other's steps. Else they get a run of their own in a group of the run's name: one that is offline
cannot be gone on with. Nothing of this ends a watcher: the results lie in the run folder anyhow.
"""

import re
import sys
from pathlib import Path
from typing import Any, Literal

import yaml

from cpt.eval.results import SuiteRecord
from cpt.eval.watched_run import finished_step
from cpt.rundir import RunDir
from cpt.train.wandb_sink import Mode, WandbSink

_RUN_FOLDER = re.compile(r"run-\d{8}_\d{6}-(?P<id>\w+)")


class WandbRecords:
    """Sends records of one suite of one run, unless that is disabled; wandb starts with the first of them."""

    def __init__(self, rundir: RunDir, suite: str, mode: Mode | Literal["disabled"]) -> None:
        self._rundir = rundir
        self._suite = suite
        self._mode = mode
        self._sink: WandbSink | None = None
        self._failed = False

    def tell(self, record: SuiteRecord) -> None:
        if self._mode == "disabled" or self._failed:
            return
        try:
            self._sink = self._sink or self._start(self._mode)
            self._sink.write(as_metrics(record))
        except Exception as error:  # wandb raises what it likes: login, network, settings of its own
            self._failed = True
            print(
                f"WARNING: no more results are sent to wandb: {type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._sink is None:
            return
        try:
            self._sink.close()
        except Exception as error:  # as above
            print(f"WARNING: wandb did not end well: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _start(self, mode: Mode) -> WandbSink:
        root = self._rundir.root.absolute()
        own = wandb_id(root) if mode == "online" and finished_step(self._rundir) is not None else None
        name = root.name if own else f"{root.name} {self._suite}"
        config = {"suite": self._suite}
        return WandbSink(mode=mode, name=name, folder=root, config=config, group=root.name, run_id=own)


def wandb_mode(config: Path) -> Literal["disabled", "offline", "online"]:
    """What the run's ``log.wandb`` says; disabled where that cannot be read."""
    try:
        raw = yaml.safe_load(config.read_text(encoding="utf-8"))
        found = raw.get("log", {}).get("wandb", "offline")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return "disabled"
    return found if found in ("offline", "online") else "disabled"


def wandb_id(root: Path) -> str | None:
    """Of the newest online run that wandb keeps in the run folder."""
    folders = sorted(path.name for path in (root / "wandb").glob("run-*") if path.is_dir())
    found = [match["id"] for name in folders if (match := _RUN_FOLDER.fullmatch(name))]
    return found[-1] if found else None


def as_metrics(record: SuiteRecord) -> dict[str, Any]:
    """Numbers by name: groups' accuracies, tasks' own metrics and the copying probe, under ``eval/SUITE``."""
    numbers = {f"{name}.accuracy": group.accuracy for name, group in record.groups.items()}
    numbers |= {f"{name}.{task.metric}": task.value for name, task in record.tasks.items()}
    if record.copying:
        numbers["copying.exact_match"] = record.copying.exact_match
    known = {name: value for name, value in numbers.items() if value is not None}
    return {"step": record.step, "tokens_seen": record.tokens_seen, f"eval/{record.suite}": known}
