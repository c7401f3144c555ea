"""A run folder under a URL (s3://, gs://, file://, ... whatever fsspec has a driver for), evaluated on this machine. No
torch.

Small files are brought into a scratch folder at every look, a checkpoint's weights only to be evaluated, and its
results are sent back, the record last. Its optimizer state is never fetched. ``URL/checkpoints/step_N`` and
``URL/step_N`` (what ``checkpoint.upload_to`` makes) are both understood; in the second the config is taken from a
checkpoint.
Refuses names that leave the scratch folder, and files whose content is not what their marker promises.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from fsspec.core import url_to_fs

from cpt.checkpoint.marker import (
    COMPLETE,
    META,
    FileFacts,
    damage_of,
    delete_checkpoint,
    is_state_shard,
    read_json,
    write_marker,
)
from cpt.checkpoint.upload import missing_driver
from cpt.eval.claims import UrlClaim, UrlClaims
from cpt.eval.results import read_suite_record, record_file
from cpt.eval.watched_run import Partial, Sight, finished_step
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, RunDir, step_name, step_of, write_atomic

Promises = Mapping[str, int]  # file -> bytes, as a marker says


class RemoteRun:
    """A run at ``url``, and the results of one suite in it; ``scratch`` becomes a run folder on this machine.

    Raises:
        ConfigError: no driver for this kind of URL.
        DataError: no run folder.
        OSError: the URL does not answer.
    """

    def __init__(self, url: str, suite: str, scratch: Path) -> None:
        if reason := missing_driver(url):
            raise ConfigError(Problem("RUN_DIR", url, reason, "install the driver, or copy the run folder"))
        self.url = url.rstrip("/")
        self.rundir = RunDir(scratch)
        self.results = self.rundir.evals / suite
        with self._asking():
            self._filesystem, self._root = url_to_fs(self.url)
            self._checkpoints = f"{self._root}/checkpoints"
            if not self._filesystem.isdir(self._checkpoints):
                self._checkpoints = self._root
            if not self._list_checkpoints() and not self._filesystem.exists(f"{self._root}/config.yaml"):
                raise DataError(f"{url}: not a run folder, it has neither config.yaml nor checkpoints")
        self._claims = UrlClaims(self._filesystem, f"{self._root}/evals/{suite}/claims")
        self._promises: dict[int, Promises] = {}
        self._brought: set[str] = set()  # records that lay there at the last look, and lie here as they were
        self.results.mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.url

    def look(self) -> Sight:
        """Raises OSError where the URL does not answer."""
        with self._asking():
            self._filesystem.invalidate_cache()
            complete, partial = set(), {}
            for step, sizes in self._list_checkpoints().items():
                if lacks := self._lacks(step, sizes):
                    partial[step] = Partial(lacks, sum(sizes.values()))
                else:
                    complete.add(step)
            there = self._names(self._far(""))
            for path in (self.rundir.config, self.rundir.plan, self.rundir.environment, self.rundir.events):
                if path.name in there:
                    self._bring_file(f"{self._root}/{path.name}", path)
            self._bring_records()
            self._fetch_results("failed", self._names(self._far_result("failed")))
        evaluated = frozenset(step for step in complete | {0} if self._is_brought(step))
        return Sight(frozenset(complete), evaluated, partial, finished_step(self.rundir))

    def has_results(self, step: int) -> bool:
        """Whether a record that can be read has arrived there by now; any other is written anew."""
        with self._asking():
            self._filesystem.invalidate_cache()
            self._bring_records()
        return self._is_brought(step)

    def is_claimed(self, step: int) -> bool:
        with self._asking():
            return bool(self._filesystem.exists(self._far_result(f"claims/{step_name(step)}.json")))

    def claim(self, step: int) -> UrlClaim | None:
        with self._asking():
            return self._claims.claim(step)

    @contextmanager
    def bring(self, step: int) -> Iterator[Path]:
        """The weights of a checkpoint on this machine, checked against its marker; deleted again afterwards."""
        folder = self.rundir.checkpoint(step)
        try:
            with self._asking():
                self._fetch(step, folder)
            yield folder
        finally:
            delete_checkpoint(folder)

    def has_unsent(self, step: int) -> bool:
        """Whether results lie here that could not be sent."""
        record = record_file(self.results, step)
        return record.is_file() and record.name not in self._brought

    def publish(self, files: Sequence[Path]) -> None:
        """Send these files of ``results``, in this order; those that are not here any more are removed there."""
        with self._asking():
            for here in files:
                there = self._far_result(here.relative_to(self.results).as_posix())
                if here.is_file():
                    self._filesystem.makedirs(there.rpartition("/")[0], exist_ok=True)
                    self._filesystem.put_file(str(here), there)
                elif self._filesystem.exists(there):
                    self._filesystem.rm_file(there)

    def _fetch(self, step: int, folder: Path) -> None:
        source = f"{self._checkpoints}/{step_name(step)}"
        delete_checkpoint(folder)
        folder.mkdir(parents=True)
        self._filesystem.get_file(f"{source}/{COMPLETE}", str(folder / COMPLETE))
        promised = {name: FileFacts(**facts) for name, facts in read_json(folder / COMPLETE).items()}
        (folder / COMPLETE).unlink()  # until the rest is here
        wanted = {name: facts for name, facts in promised.items() if not is_state_shard(name)}
        for name, facts in wanted.items():
            _check_name(name, source)
            self._filesystem.get_file(f"{source}/{name}", str(folder / name))
            if damage := damage_of(folder / name, facts):
                raise OSError(f"{damage}; it came from {self.url}")
        write_marker(folder, wanted)
        if not self.rundir.config.is_file():
            run_config = read_json(folder / META).get("run_config")
            write_atomic(self.rundir.config, yaml.safe_dump(run_config))

    def _bring_records(self) -> None:
        """Make the records here those there, but for what could not be sent: one that was deleted there, to have it
        measured again, must not go back.
        """
        there = {
            name: size for name, size in self._names(self._far_result("")).items() if step_of(Path(name)) is not None
        }
        for name in self._brought - there.keys():
            (self.results / name).unlink(missing_ok=True)
        for name, size in there.items():
            here = self.results / name
            if not here.is_file() or here.stat().st_size != size:
                self._bring_file(self._far_result(name), here)
        self._brought = set(there)

    def _is_brought(self, step: int) -> bool:
        record = record_file(self.results, step)
        if record.name not in self._brought:
            return False
        try:
            read_suite_record(record)
        except DataError:  # damaged, or of another version
            return False
        return True

    def _bring_file(self, there: str, here: Path) -> None:
        """A small file, whole or not at all."""
        write_atomic(here, self._filesystem.cat_file(there))

    def _fetch_results(self, folder: str, there: Mapping[str, int]) -> None:
        """Make ``results/folder`` here what it is there."""
        here = self.results / folder
        here.mkdir(exist_ok=True)
        for path in here.iterdir():
            if path.name not in there:
                path.unlink()
        for name in there:
            _check_name(name, folder)
            self._bring_file(self._far_result(f"{folder}/{name}"), here / name)

    def _list_checkpoints(self) -> dict[int, dict[str, int]]:
        """By step: file -> bytes."""
        found: dict[int, dict[str, int]] = {}
        for path, facts in self._filesystem.find(self._checkpoints, detail=True).items():
            folder, _, name = path.rpartition("/")
            step = step_of(Path(folder))
            if step is not None:
                found.setdefault(step, {})[name] = int(facts.get("size") or 0)
        return found

    def _lacks(self, step: int, sizes: Mapping[str, int]) -> str:
        """What a checkpoint needs to be complete; empty where it is."""
        if COMPLETE not in sizes:
            return f"it has no {COMPLETE} file yet"
        if step not in self._promises or self._promises[step].get(COMPLETE) != sizes[COMPLETE]:
            content = self._filesystem.cat_file(f"{self._checkpoints}/{step_name(step)}/{COMPLETE}")
            try:
                promised = {name: int(facts["bytes"]) for name, facts in json.loads(content).items()}
            except (ValueError, AttributeError, KeyError, TypeError):
                return f"its {COMPLETE} file is not readable"
            self._promises[step] = {**promised, COMPLETE: sizes[COMPLETE]}
        missing = [name for name, size in self._promises[step].items() if sizes.get(name) != size]
        return f"{len(missing)} of {len(self._promises[step])} files are not there in their size" if missing else ""

    def _names(self, folder: str) -> dict[str, int]:
        """Files directly in a folder: name -> bytes."""
        if not self._filesystem.isdir(folder):
            return {}
        listed = self._filesystem.ls(folder, detail=True)
        return {Path(each["name"]).name: int(each["size"] or 0) for each in listed if each["type"] == "file"}

    def _far(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _far_result(self, name: str) -> str:
        return self._far(f"evals/{self.results.name}/{name}")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Drivers raise what they like; here it is the environment that is at fault."""
        try:
            yield
        except (OSError, DataError):
            raise
        except Exception as error:
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error


def _check_name(name: str, where: str) -> None:
    if Path(name).name != name or name in ("", ".", ".."):
        raise DataError(f"{where}: names the file {name!r}, which would lie elsewhere; copy the checkpoint again")
