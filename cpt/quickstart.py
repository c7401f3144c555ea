"""The whole pipeline on text that every Python installation holds: corpora, tokenizer, stores, a base model, three
continuations, a report.

A small base is trained on general English prose, then continued on Python code at an equal token budget in three
ways: without replay, with replay and re-warming, and from scratch. Every stage leaves files; a stage whose files are
complete is skipped, so a second call is instant and a killed one goes on where it was. Trains through the same run
files and the same command as any other run.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cpt.checkpoint.portable import COMPLETE
from cpt.config import ConfigError, Problem, RunConfig, validate
from cpt.offline import export
from cpt.report.render import build_report
from cpt.rundir import RunDir, write_atomic
from cpt.runfolder import read_run_config
from cpt.train.guard import EXIT_STOPPED
from data_tools.embedded import write_embedded_corpus
from data_tools.sources import ReadOptions, read_texts, resolve_inputs
from data_tools.store_builder import StoreRequest, build_store
from data_tools.train_tokenizer import train_bpe

VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Scale:
    """How much is trained; token counts are whole steps."""

    hidden_size: int
    num_layers: int
    seq_len: int
    base_tokens: int
    continued_tokens: int
    heldout_tokens: int
    global_batch_tokens: int = 4096
    micro_batch_size: int = 4  # of 256 tokens; with more the logits are too big for malloc to keep


FULL = Scale(
    hidden_size=128, num_layers=4, seq_len=256, base_tokens=750_000, continued_tokens=250_000, heldout_tokens=16_384
)
FAST = Scale(
    hidden_size=64,
    num_layers=2,
    seq_len=128,
    base_tokens=300_000,
    continued_tokens=150_000,
    heldout_tokens=4_096,
    micro_batch_size=8,
)

# name -> share of general data, or None for "a new model, on the domain alone"
CONTINUATIONS: dict[str, float | None] = {"no_replay": 0.0, "replay": 0.25, "from_scratch": None}


@dataclass(frozen=True)
class Quickstart:
    """Where everything goes and with which settings."""

    out: Path
    seed: int
    scale: Scale

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @property
    def stores(self) -> dict[str, Path]:
        return {"prose": self.out / "stores" / "prose", "code": self.out / "stores" / "code"}

    @property
    def base(self) -> Path:
        return self.out / "base_hf"


def quickstart(out: Path, *, seed: int = 1234, fast: bool = False) -> Path:
    """Run every stage that is not done yet; returns the report's HTML page."""
    job = Quickstart(out.absolute(), seed, FAST if fast else FULL)
    job.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    stages: list[tuple[str, Callable[[Quickstart], None]]] = [
        ("corpora: English prose and Python code from this installation", _corpora),
        (f"tokenizer: byte-level BPE, {VOCAB_SIZE} tokens, from the general text alone", _tokenizer),
        ("token stores", _stores),
        ("base model: trained on the general corpus", lambda job: _train(job, "base")),
        ("base model: exported to Hugging Face format", _export_base),
        *((f"continued: {name}", lambda job, name=name: _train(job, name)) for name in CONTINUATIONS),
    ]
    for number, (title, stage) in enumerate(stages, start=1):
        console.print(f"[bold]{number}/{len(stages) + 1}  {title}[/]")
        started = time.monotonic()
        stage(job)
        console.print(f"      {time.monotonic() - started:.1f} s", style="dim")
    console.print(f"[bold]{len(stages) + 1}/{len(stages) + 1}  report[/]")
    paths = build_report([job.out / "runs" / name for name in CONTINUATIONS], job.out / "report")
    console.print(f"\nThe report: {paths.html}\n  and as text: {paths.markdown}")
    return paths.html


def _corpora(job: Quickstart) -> None:
    done = job.out / "corpora" / "DONE"
    if not done.exists():
        corpus = write_embedded_corpus(job.out / "corpora")
        write_atomic(done, f"general {corpus.general_bytes} bytes\ndomain {corpus.domain_bytes} bytes\n")
    print("      " + done.read_text().strip().replace("\n", ", "))


def _tokenizer(job: Quickstart) -> None:
    if not (job.tokenizer / "tokenizer.json").exists():
        (corpus,) = resolve_inputs([str(job.out / "corpora" / "general.jsonl.zst")])
        train_bpe(read_texts(corpus, ReadOptions()), vocab_size=VOCAB_SIZE, out=job.tokenizer)


def _stores(job: Quickstart) -> None:
    for name, file, domain in (("prose", "general", "general"), ("code", "domain", "code")):
        request = StoreRequest(
            inputs=(str(job.out / "corpora" / f"{file}.jsonl.zst"),),
            tokenizer=job.tokenizer,
            out=job.stores[name],
            source=name,
            domain=domain,
            heldout_fraction=0.03,  # of a few megabytes: enough to measure a hundredth of a nat
        )
        for split, result in build_store(request).splits.items():
            print(f"      {name}/{split}: {result.documents:,} documents, {result.tokens:,} tokens")


def run_config(job: Quickstart, name: str) -> RunConfig:
    """The run file of the base or of one continuation."""
    scale, share = job.scale, CONTINUATIONS.get(name, 1.0)
    fresh = name == "base" or share is None
    tokens = scale.base_tokens if name == "base" else scale.continued_tokens
    tokens -= tokens % scale.global_batch_tokens
    steps = tokens // scale.global_batch_tokens
    raw: dict[str, Any] = {
        "run": {"name": name, "dir": str(job.out / "runs"), "seed": job.seed},
        "model": {"fresh": _architecture(scale), "tokenizer": str(job.tokenizer)}
        if fresh
        else {"init_from": str(job.base)},
        "data": {"stores": {k: str(v) for k, v in job.stores.items()}, "seq_len": scale.seq_len},
        "replay": {"share_general": share or 0.0},
        "train": {
            "tokens": tokens,
            "global_batch_tokens": scale.global_batch_tokens,
            "micro_batch_size": scale.micro_batch_size,
            "peak_lr": 3e-3,
            "schedule": {"name": "rewarm_cosine", "warmup_steps": max(2, steps // 20)},
            "precision": "fp32",
        },
        # Forgetting is fastest at the start, so that is where evaluations are dense.
        "eval": {
            "at_steps": [] if name == "base" else sorted({steps * part // 16 for part in (1, 2, 4, 8, 12)} - {0}),
            "tokens_per_source": scale.heldout_tokens,
        },
        "checkpoint": {"every_steps": max(1, steps // 4), "keep_last": 1},
        "log": {"every_steps": max(1, steps // 20), "wandb": "disabled"},
    }
    return validate(raw)


def _architecture(scale: Scale) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": scale.hidden_size,
        "intermediate_size": scale.hidden_size * 8 // 3 // 8 * 8,
        "num_hidden_layers": scale.num_layers,
        "num_attention_heads": scale.hidden_size // 32,
        "num_key_value_heads": scale.hidden_size // 32,
        "max_position_embeddings": scale.seq_len,
        "tie_word_embeddings": True,
    }


def _train(job: Quickstart, name: str) -> None:
    """Train in a process of its own, as a user would; a finished run is skipped, a stopped one resumed."""
    config = run_config(job, name)
    rundir = RunDir(config.run_dir)
    if rundir.config.exists():
        _check_settings(job, read_run_config(rundir.root), config)
    if _is_finished(rundir):
        return
    if rundir.config.exists():
        arguments = ["--resume", str(rundir.root)]
    else:
        file = job.out / "run_files" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False))
        arguments = [str(file)]
    code = _run_to_its_end([sys.executable, "-m", "cpt.train.main", *arguments])
    if code == EXIT_STOPPED:
        print("stopped; the same command goes on from here", flush=True)
        raise SystemExit(EXIT_STOPPED)
    if code != 0:
        raise RuntimeError(
            f"training {name} ended with exit code {code}; its messages stand above. Run the same command again"
        )


def _check_settings(job: Quickstart, found: RunConfig, wanted: RunConfig) -> None:
    """Refuse to show a finished quickstart as the result of other settings."""
    if (found.run.seed, found.data.seq_len, found.train) != (wanted.run.seed, wanted.data.seq_len, wanted.train):
        rule = "holds a quickstart that was made with another --seed or --fast"
        raise ConfigError(Problem("--out", str(job.out), rule, "give another --out, or delete that folder"))


def _run_to_its_end(command: list[str]) -> int:
    """Run a process that saves when it is told to stop. SIGTERM goes on to it; Ctrl-C reaches it from the terminal."""
    process = subprocess.Popen(command)
    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number)),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
    }
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_finished(rundir: RunDir) -> bool:
    if not rundir.plan.exists():
        return False
    from cpt.plan import read_plan

    return (rundir.checkpoint(read_plan(rundir.plan).num_steps) / COMPLETE).is_file()


def _export_base(job: Quickstart) -> None:
    if not job.base.exists():
        steps = sorted((job.out / "runs" / "base" / "checkpoints").glob("step_*"))
        export(steps[-1], job.base)
