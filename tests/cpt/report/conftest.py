"""Run folders written from a few numbers, with the real plan and file formats but without training anything."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.plan import PlanSource, StageWish, build_plan, write_plan
from cpt.rundir import RunDir

SEQ_LEN, BATCH_ROWS = 128, 32
STEP_TOKENS = SEQ_LEN * BATCH_ROWS
VOCABULARY = 4096
START_TIME = 1_700_000_000.0


@dataclass(frozen=True)
class Story:
    """What a synthetic run went through; losses in nats. ``general_end`` and ``domain_end`` are where the held-out
    losses settle."""

    name: str = "replay"
    share_general: float = 0.25
    init_from: str | None = "runs/base/checkpoints/step_00000400"
    general_end: float = 3.02
    domain_end: float = 2.30
    general_base: float = 2.98
    domain_base: float = 3.90
    steps: int = 200
    log_every: int = 1
    bump: float = 0.12


RunWriter = Callable[..., Path]


def write_run(root: Path, story: Story) -> Path:
    """A finished run folder under ``root``, named like the run."""
    paths = RunDir(root / (story.name if story.name.isidentifier() else "odd_name"))
    for folder in (paths.root, paths.evals, paths.checkpoint(story.steps)):
        folder.mkdir(parents=True)
    paths.config.write_text(yaml.safe_dump(_config(story), sort_keys=False))
    paths.environment.write_text(
        json.dumps({"python": "3.12.4", "torch": "2.13.0", "world_size": 2, "command": ["cpt", "train"]})
    )
    write_plan(paths.plan, _plan(story))
    lines = [_metrics_line(story, step) for step in range(1, story.steps + 1) if step % story.log_every == 0]
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluated = sorted({0, *(round(story.steps * part) for part in (0.04, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0))})
    for step in evaluated:
        paths.eval_file(step).write_text(json.dumps(_evaluation(story, step)))
    events = [
        ("start", 0),
        *(("eval", step) for step in evaluated),
        ("checkpoint", story.steps),
        ("finish", story.steps),
    ]
    paths.events.write_text(
        "".join(json.dumps({"time": START_TIME + step, "step": step, "event": kind}) + "\n" for kind, step in events)
    )
    return paths.root


@pytest.fixture
def make_run(tmp_path: Path) -> RunWriter:
    def make(**changes: Any) -> Path:
        return write_run(tmp_path / "runs", Story(**changes))

    return make


def _config(story: Story) -> dict[str, Any]:
    return {
        "run": {"name": story.name, "dir": "runs", "seed": 1},
        "model": {"init_from": story.init_from},
        "data": {"stores": {"prose": "stores/prose", "python": "stores/python"}, "seq_len": SEQ_LEN, "max_epochs": 4.0},
        "replay": {"share_general": story.share_general},
        "train": {"tokens": story.steps * STEP_TOKENS, "global_batch_tokens": STEP_TOKENS, "peak_lr": 1e-3},
    }


def _plan(story: Story) -> Any:
    rows = story.steps * BATCH_ROWS
    sources = [
        PlanSource("prose", "general", max(1, rows // 2), max(1, rows // 2) * SEQ_LEN, "aa"),
        PlanSource("python", "domain", max(1, rows // 2), max(1, rows // 2) * SEQ_LEN, "bb"),
    ]
    wish = StageWish(tokens=story.steps * STEP_TOKENS, share_general=story.share_general)
    plan, _ = build_plan(sources, [wish], seed=1, seq_len=SEQ_LEN, global_batch_rows=BATCH_ROWS, max_epochs=4.0)
    return plan


def _losses(story: Story, step: int) -> tuple[float, float]:
    """Held-out losses of general and domain after ``step`` steps: exponential approach, with a re-warming bump on the
    general side."""
    part = step / story.steps
    start = (math.log(VOCABULARY),) * 2 if story.init_from is None else (story.general_base, story.domain_base)
    ends = (story.general_end, story.domain_end)
    general, domain = (end + (first - end) * math.exp(-7 * part) for first, end in zip(start, ends, strict=True))
    return general + story.bump * math.exp(-(((part - 0.2) / 0.15) ** 2)) * (step > 0), domain


def _metrics_line(story: Story, step: int) -> dict[str, Any]:
    general, domain = _losses(story, step)
    wobble = 0.10 * math.sin(step * 12.9898) + 0.05 * math.sin(step * 4.1414)
    part, tokens = step / story.steps, step * STEP_TOKENS
    losses = {"python": domain + 1.3 * wobble} | ({"prose": general + wobble} if story.share_general else {})
    drift = round(0.004 * tokens * math.sin(step / 9) * story.share_general)
    prose = round(tokens * story.share_general) + drift
    lr = 1e-3 * min(part / 0.05, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, part - 0.05) / 0.95)))
    return {
        "step": step, "tokens_seen": tokens, "loss": sum(losses.values()) / len(losses), "loss_by_source": losses,
        "tokens_by_source": {"prose": prose, "python": tokens - prose}, "lr": lr, "grad_norm": 0.8, "mfu": 0.31,
        "tokens_per_second": 9000 + 900 * wobble, "step_seconds": 0.45, "memory_bytes": 1.4e9,
        "steps": 1, "tokens_per_second_overall": 7000 + 900 * wobble, "flops_per_second": 3.1e14,
        "phase_seconds": {"data": 0.002, "forward": 0.15, "backward": 0.25, "optimizer": 0.03, "evaluation": 0.018},
        "time": START_TIME + step,
    }  # fmt: skip


def _evaluation(story: Story, step: int) -> dict[str, Any]:
    general, domain = _losses(story, step)
    sources = {
        name: {
            "group": group,
            "loss": loss,
            "bpb": loss * 0.38,
            "ppl": math.exp(loss),
            "tokens": 65536,
            "documents": 90,
        }
        for name, group, loss in (("prose", "general", general), ("python", "domain", domain))
    }
    groups = {source["group"]: {"loss": source["loss"]} for source in sources.values()}
    return {"step": step, "tokens_seen": step * STEP_TOKENS, "sources": sources, "groups": groups}
