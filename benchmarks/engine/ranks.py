"""Training jobs of several ranks for the benchmarks of the engine, quick to start and open to faults.

A rank is a fork of this process, which has imported what a training needs and computes nothing itself; it then runs
what ``python -m cpt.train.main ARGUMENTS`` runs, as its own process with its own environment. So a start costs a
second instead of ten, and hundreds of jobs can be started, killed and resumed. ``before`` runs in a rank first: there a
benchmark injects a fault, never in the product's code.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cpt.failures import leave
from cpt.quickstart_crew import PRELOADED, Fork

VOCAB_SIZE = 512
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def preload() -> None:
    """Import what ranks need, once; call it before the first job and compute nothing with torch here."""
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    for name in PRELOADED:
        importlib.import_module(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Ranks:
    """The processes of one job; all output goes to ``log``."""

    arguments: Sequence[str]
    world: int
    log: Path
    before: Callable[[int], None] = lambda rank: None
    processes: list[Fork] = field(default_factory=list)

    def start(self) -> "Ranks":
        port = free_port()
        self.processes = [Fork(lambda rank=rank: self._work(rank, port)) for rank in range(self.world)]
        return self

    def _work(self, rank: int, port: int) -> None:
        import torch

        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world}
        os.environ.update({name: str(value) for name, value in where.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["main.py", *self.arguments]
        self.before(rank)
        from cpt.train.main import main

        leave(main(list(self.arguments)))

    def send(self, number: int, ranks: Iterable[int] | None = None) -> None:
        for rank in range(self.world) if ranks is None else ranks:
            self.processes[rank].send_signal(number)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Exit codes of all ranks; those that still run after ``seconds`` are killed and give -9."""
        deadline = time.monotonic() + seconds
        while None in self.codes() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.send(signal.SIGKILL)
        return [process.wait() if process.poll() is None else int(process.poll() or 0) for process in self.processes]


def in_fork(work: Callable[[], None]) -> None:
    """Work that uses torch or threads, kept out of the process that forks. Raises RuntimeError if it fails."""
    process = Fork(work)
    while process.poll() is None:
        time.sleep(0.02)
    if process.poll():
        raise RuntimeError(f"{work} ended with {process.poll()}")


def write_stores(folder: Path, *, num_documents: int = 400) -> dict[str, str]:
    """A general and a domain store of documents of 5 to 90 tokens, each with a held-out split.

    A source has 48 tokens of its own, each mostly followed by the same other one: learnt in tens of steps, so that
    spoilt labels stand out.
    """
    import numpy as np

    from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split

    stores = {}
    for name, first in (("general", 1), ("domain", 101)):
        follower = np.random.default_rng(first).permutation(48)
        for split, number in (("train", num_documents), ("heldout", 40)):
            draw = np.random.default_rng([first, len(split)])
            documents = []
            for _ in range(number):
                ids = [int(draw.integers(48))]
                for _ in range(int(draw.integers(4, 89))):
                    ids.append(int(follower[ids[-1]]) if draw.random() < 0.9 else int(draw.integers(48)))
                documents.append([*(first + each for each in ids), 0])
            label = StoreLabel(name, name, split, VOCAB_SIZE, 0, TokenizerFacts("none", "0" * 64, "none"))
            write_split(folder / name / split, label, [documents])
        stores[name] = str(folder / name)
    return stores


def write_run(path: Path, stores: Mapping[str, str], *, steps: int, rows: int = 8, **fields: Any) -> Path:
    """A run file beside which the run folder will lie; ``fields`` are dotted names with ``__`` for the dot."""
    seq_len = int(MODEL["max_position_embeddings"])  # type: ignore[call-overload]
    raw: dict[str, Any] = {
        "run": {"name": path.stem, "dir": str(path.parent)},
        "model": {"fresh": dict(MODEL)},
        "data": {"stores": dict(stores), "seq_len": seq_len, "max_epochs": 1000},
        "replay": {"share_general": 0.25},
        "train": {"tokens": steps * rows * seq_len, "global_batch_tokens": rows * seq_len, "micro_batch_size": 1},
        "eval": {"tokens_per_source": 512},
        "log": {"every_steps": 1, "wandb": "disabled"},
    }
    raw["train"] |= {"peak_lr": 5e-3, "precision": "fp32"}
    for name, value in fields.items():
        *sections, leaf = name.split("__")
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    path.write_text(yaml.safe_dump(raw))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a last one that was cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
