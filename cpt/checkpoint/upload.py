"""Copies of complete checkpoints at a URL (s3://, gs://, file://, ... whatever fsspec has a driver for), made in the
background. No torch.

A checkpoint is copied file by file, its marker last, so that a copy with a marker is complete. One whose marker is
there already is not copied again, after a resume either. A failed copy is tried again a few times and then reported;
it never ends a run. Nothing is ever deleted at the URL, but for the marker of a copy that is about to be replaced.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import split_protocol, url_to_fs
from fsspec.registry import get_filesystem_class

from cpt.checkpoint.marker import COMPLETE, read_json, read_marker
from cpt.rundir import DataError, step_of

RETRY_SECONDS = (2.0, 15.0, 60.0)


def missing_driver(url: str) -> str | None:
    """Why nothing could be copied to this kind of URL, or None."""
    protocol, _ = split_protocol(url)
    try:
        get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Upload:
    """How the copy of one checkpoint went."""

    step: int
    url: str
    bytes: int = 0  # 0: it was there already
    seconds: float = 0.0
    error: str | None = None


class Uploader:
    """Copies checkpoints to ``url``/``run_name``, one after the other, in a thread of its own."""

    def __init__(self, url: str, run_name: str, *, retry_seconds: Sequence[float] = RETRY_SECONDS) -> None:
        self.url = f"{url.rstrip('/')}/{run_name}"
        self.retry_seconds = retry_seconds
        self._waiting: queue.Queue[Path] = queue.Queue()
        self._ended: queue.Queue[Upload] = queue.Queue()
        self._closing = threading.Event()
        self._current: Path | None = None
        self._thread: threading.Thread | None = None

    def add(self, folder: Path) -> None:
        """Copy this complete checkpoint when its turn comes; does not wait."""
        self._waiting.put(folder)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
            self._thread.start()

    @property
    def busy(self) -> frozenset[int]:
        """The step that is being copied now: its files must stay."""
        current = self._current
        step = step_of(current) if current is not None else None
        return frozenset() if step is None else frozenset({step})

    def poll(self) -> list[Upload]:
        """Copies that ended since the last call."""
        ended = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended

    def finish(self, *, timeout: float, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Wait until everything is copied, at most ``timeout`` seconds, asking ``should_stop`` all the while; returns
        whether it is.
        """
        deadline = time.monotonic() + timeout
        while self._waiting.unfinished_tasks and time.monotonic() < deadline and not should_stop():
            time.sleep(0.02)
        self._closing.set()
        return not self._waiting.unfinished_tasks

    def _work(self) -> None:
        while not self._closing.is_set():
            folder = self._waiting.get()
            self._current = folder
            self._ended.put(self._copy_stubbornly(folder))
            self._current = None
            self._waiting.task_done()

    def _copy_stubbornly(self, folder: Path) -> Upload:
        step, started, url = step_of(folder) or 0, time.monotonic(), f"{self.url}/{folder.name}"
        reason = ""
        for pause in (*self.retry_seconds, 0.0):
            try:
                size = copy_checkpoint(folder, url)
                return Upload(step, url, size, round(time.monotonic() - started, 3))
            except DataError as error:  # retention was faster: a newer one is copied instead
                return Upload(step, url, error=str(error))
            except Exception as error:  # drivers raise what they like: network, credentials, quota
                reason = f"{type(error).__name__}: {error}"
            if self._closing.wait(pause):
                break
        return Upload(step, url, seconds=round(time.monotonic() - started, 3), error=reason)


def copy_checkpoint(folder: Path, url: str) -> int:
    """Copy a complete checkpoint unless a whole copy is there; returns the bytes that were copied.

    Raises:
        DataError: the folder holds no complete checkpoint.
        Exception: whatever the driver of the URL raises.
    """
    promised = read_marker(folder)
    marker = (folder / COMPLETE).read_bytes()
    filesystem, root = url_to_fs(url)
    remote = _remote_marker(filesystem, f"{root}/{COMPLETE}")
    if remote.items() >= read_json(folder / COMPLETE).items():
        return 0  # also where the checkpoint here was reduced to its weights since
    if remote:
        filesystem.rm_file(f"{root}/{COMPLETE}")
    filesystem.makedirs(root, exist_ok=True)
    for name, facts in promised.items():
        filesystem.put_file(str(folder / name), f"{root}/{name}")
        if (arrived := filesystem.size(f"{root}/{name}")) != facts.bytes:
            raise OSError(f"{url}/{name}: {arrived} of {facts.bytes} bytes arrived")
    filesystem.pipe_file(f"{root}/{COMPLETE}", marker)
    return sum(facts.bytes for facts in promised.values())


def _remote_marker(filesystem: Any, path: str) -> Mapping[str, Any]:
    """What the marker at the URL promises; empty where there is none, or none that can be read."""
    if not filesystem.exists(path):
        return {}
    try:
        content = json.loads(filesystem.cat_file(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
