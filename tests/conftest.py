"""A workshop for tests that need whole runs: tiny token stores, run files, and `cpt` in this process or in its own.

Imports nothing heavy: what is heavy is imported by the test that asks for it.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

SEQ_LEN, VOCAB_SIZE = 32, 64
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("CROSS_RANK", "CROSS_SIZE"),
)
Documents = Sequence[Sequence[int]]

# Before anything imports torch: two test processes with a thread per core each wait for one another at every barrier,
# which was measured to cost a factor of ten.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Done:
    """How a command ended; ``text`` is all it printed."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


class Workshop:
    """A folder with stores, run files and runs; ``root / "runs"`` holds the run folders."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def store(
        self,
        name: str,
        *,
        domain: str,
        train: Documents,
        heldout: Documents,
        vocab_size: int = VOCAB_SIZE,
        tokenizer: str = "tiny",
    ) -> Path:
        """A token store of documents of ids; EOS (0) is added to each. ``tokenizer``: its name and fingerprint."""
        from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split

        for split, documents in (("train", train), ("heldout", heldout)):
            label = StoreLabel(name, domain, split, vocab_size, 0, TokenizerFacts(tokenizer, tokenizer * 8, "tiny"))
            ended = [[*document, 0] for document in documents]
            write_split(self.root / name / split, label, [ended], utf8_bytes=2 * sum(map(len, documents)))
        return self.root / name

    def stores(self) -> dict[str, Path]:
        """``prose`` to replay and ``code`` to learn: counting up in steps of 7 and of 11, by arithmetic alone."""
        found = {}
        for name, domain, stride in (("prose", "general", 7), ("code", "code", 11)):
            train, heldout = ([counting(stride, row) for row in rows] for rows in (range(400), range(400, 430)))
            found[name] = self.store(name, domain=domain, train=train, heldout=heldout)
        return found

    def run_file(self, name: str, changes: Mapping[str, Any] | None = None) -> Path:
        """A run file over ``stores()``; ``changes`` are dotted fields. None removes a field."""
        raw: dict[str, Any] = {
            "run": {"name": name, "dir": str(self.root / "runs")},
            "model": {"fresh": tiny_llama()},
            "data": {"stores": {name: str(self.root / name) for name in ("prose", "code")}, "seq_len": SEQ_LEN},
            "train": {"tokens": 256 * 8, "global_batch_tokens": 256, "micro_batch_size": 4, "peak_lr": 1e-2},
            "eval": {"tokens_per_source": 512},
            "log": {"every_steps": 1, "wandb": "disabled"},
        }
        raw["train"]["precision"] = "fp32"
        for key, value in (changes or {}).items():
            section, _, field = key.partition(".")
            raw.setdefault(section, {})[field] = value
            if value is None:
                del raw[section][field]
        file = self.root / f"{name}.yaml"
        file.write_text(json.dumps(raw, indent=1))  # JSON is YAML
        return file

    def cpt(self, *arguments: object) -> Done:
        """`cpt ARGUMENTS` in this process."""
        from cpt.cli import main

        out, err, code = StringIO(), StringIO(), 0
        argv = ["cpt", *map(str, arguments)]
        with leaving_no_trace(), patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

    def start(self, *arguments: object, module: str = "cpt.cli") -> subprocess.Popen[str]:
        """`cpt ARGUMENTS` as a process, one thread per rank, in a session of its own."""
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return self.start_command(command)

    def start_command(self, command: Sequence[str]) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**kept, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run_dir(self, name: str) -> Path:
        return self.root / "runs" / name

    def records(self, name: str) -> list[dict[str, Any]]:
        """What stands in a run's metrics.jsonl now, whole lines only."""
        file = self.run_dir(name) / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.strip() and line.endswith("\n")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir(name) / "events.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> dict[int, float]:
        """Training loss by step; the last record counts where a resumed run repeated a step."""
        return {record["step"]: record["loss"] for record in self.records(name)}

    def evaluation(self, name: str, step: int) -> dict[str, Any]:
        return dict(json.loads((self.run_dir(name) / "evals" / f"step_{step:08d}.json").read_text()))

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen[str]) -> None:
        """Return as soon as the run of that process has logged ``step``."""
        deadline = time.monotonic() + 120
        while (not (found := self.records(name))) or found[-1]["step"] < step:
            assert process.poll() is None, f"ended with {process.returncode}:\n{process.communicate()[0]}"
            assert time.monotonic() < deadline, f"step {step} not reached"
            time.sleep(0.01)


def counting(stride: int, row: int) -> list[int]:
    """40 ids from 1 to 60 that go up by ``stride``, except that every fifth depends on the row."""
    return [(row * 13 + stride * i + (row * row * 31 + i * 17) % 7 * (i % 5 == 0)) % 60 + 1 for i in range(40)]


def tiny_llama(*, hidden_size: int = 32, vocab_size: int = VOCAB_SIZE, positions: int = SEQ_LEN) -> dict[str, Any]:
    """A Hugging Face config of 20 to 100 thousand parameters."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": positions}
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 2}
    return {"model_type": "llama", "vocab_size": vocab_size, "tie_word_embeddings": True, **sizes, **heads}


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Training in this process sets signal handlers and launcher variables, and DeepSpeed keeps its process group."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        if torch:
            torch.set_num_threads(1)
        if "deepspeed" in sys.modules:
            sys.modules["deepspeed"].utils.groups._WORLD_GROUP = None  # of a job that ended
        try:
            yield
        finally:
            if torch and threads:
                torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """An empty workshop."""
    return Workshop(tmp_path)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Workshop], None]], Workshop]:
    """A workshop made by one test process and read by all of them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Workshop], None]) -> Workshop:
        folder = base / name
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "MADE").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(Workshop(folder))
                (folder / "MADE").touch()
        return Workshop(folder)

    return made


@pytest.fixture(scope="module")
def outside_a_job() -> Iterator[None]:
    """For lm_eval in this process, where earlier tests were ranks: accelerate takes what they left for a job."""
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as patched:
        for name in LAUNCHER_VARIABLES:
            patched.delenv(name, raising=False)
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)
