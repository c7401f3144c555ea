"""Run folders written from a few numbers, with the real plan and file formats but without training anything.

For the tests of the report and for ``benchmarks/eval/report_size.py``.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from cpt.eval.document_texts import document_texts_file, write_document_texts
from cpt.eval.results import (
    CopyingProbe,
    Measured,
    SuiteRecord,
    TaskResult,
    group_scores,
    items_file,
    pieces_file,
    record_file,
    texts_file,
    write_items,
    write_pieces,
    write_suite_record,
    write_texts,
)
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
    evaluations: int = 0  # evenly spaced; 0: seven, dense at the start


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
    evaluated = evaluated_steps(story)
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


def evaluated_steps(story: Story) -> list[int]:
    parts = (0.04, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    if story.evaluations:
        parts = tuple((n + 1) / story.evaluations for n in range(story.evaluations))
    return sorted({0, *(round(story.steps * part) for part in parts)})


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
            "stderr": 0.012,
        }
        for name, group, loss in (("prose", "general", general), ("python", "domain", domain))
    }
    kept = ("loss", "bpb", "ppl", "tokens")
    groups = {source["group"]: {name: source[name] for name in kept} for source in sources.values()}
    return {"step": step, "tokens_seen": step * STEP_TOKENS, "sources": sources, "groups": groups}


@dataclass(frozen=True)
class Exam:
    """A suite's results. ``tasks``: name -> (group, share of right answers lost by the end, share gained)."""

    tasks: dict[str, tuple[str, float, float]]
    items: int = 200
    overlapping: int = 0
    prompt: str = "Which of these is item {item} of {task}?"
    suite: str = "general_vs_law"


TWO_GROUPS = Exam(
    {"blimp_agreement": ("general", 0.30, 0.02), "arc_easy": ("general", 0.04, 0.04), "law": ("domain", 0.02, 0.3)}
)


def write_exam(root: Path, exam: Exam, steps: list[int]) -> None:
    """Results of a suite on every one of ``steps``; items are kept for the first and the last."""
    folder = RunDir(root).evals / exam.suite
    for place, step in enumerate(steps):
        part = place / max(1, len(steps) - 1)
        scores = {name: _scores(exam, name, part) for name in exam.tasks}
        tasks = {name: _task(exam, name, scores[name]) for name in exam.tasks}
        record = SuiteRecord(
            suite=exam.suite, suite_hash="5" * 16, step=step, tokens_seen=step * STEP_TOKENS, weights_hash="w" * 16,
            tokenizer="t" * 16, dtype="fp32", harness="lm_eval 0.4.9", tasks=tasks, groups=group_scores(tasks),
            copying=CopyingProbe(0.9 - 0.4 * part, 0.03, 0.95 - 0.2 * part, 0.01, 100, 50),
        )  # fmt: skip
        write_suite_record(record_file(folder, step), record)
        if step in (steps[0], steps[-1]):
            write_items(items_file(folder, step), _items(exam, scores))
    write_texts(texts_file(folder), _texts(exam))


def _scores(exam: Exam, name: str, part: float) -> np.ndarray:
    """0 or 1 per item: 70% right at the start, then the first of them are lost and the last of the others learned."""
    _, lost, gained = exam.tasks[name]
    number, right = exam.items, round(0.7 * exam.items)
    scores = (np.arange(number) < right).astype(np.float64)
    scores[: round(lost * part * number)] = 0.0
    scores[number - round(gained * part * number) :] = 1.0
    return scores


def _task(exam: Exam, name: str, scores: np.ndarray) -> TaskResult:
    value, error = float(scores.mean()), float(scores.std(ddof=1) / math.sqrt(len(scores)))
    clean = float(scores[exam.overlapping :].mean())
    return TaskResult(
        group=exam.tasks[name][0], kind="multiple_choice", metric="acc", higher_is_better=True, value=value,
        stderr=error, metrics={"acc": Measured(value, error)}, items=exam.items, truncated=0,
        overlapping=exam.overlapping, value_without_overlap=clean, stderr_without_overlap=error, few_shot=0,
        task_hash="h" * 16, seconds=1.0,
    )  # fmt: skip


def _items(exam: Exam, scores: dict[str, np.ndarray]) -> pa.Table:
    names = [name for name in exam.tasks for _ in range(exam.items)]
    numbers = list(range(exam.items)) * len(exam.tasks)
    right = np.concatenate(list(scores.values()))
    return pa.table(
        {
            "task": names, "item": numbers, "score": right, "weight": [1.0] * len(names), "margin": right * 2.0 - 1.0 + np.arange(len(right)) % 7 * 0.1,
            "chosen": ["yes" if score else "no" for score in right], "truncated": [False] * len(names),
            "overlap": [number < exam.overlapping for number in numbers],
        }
    )  # fmt: skip


def _texts(exam: Exam) -> pa.Table:
    rows = [(name, item) for name in exam.tasks for item in range(exam.items)]
    return pa.table(
        {
            "task": [name for name, _ in rows], "item": [item for _, item in rows],
            "subset": ["even" if item % 2 == 0 else "odd" for _, item in rows],
            "prompt": [exam.prompt.format(item=item, task=name) for name, item in rows],
            "gold": ["yes"] * len(rows), "choices": [["yes", "no"]] * len(rows),
        }
    )  # fmt: skip


def write_document_losses(
    root: Path, story: Story, *, documents: int = 60, text: str = "Document {n} begins here"
) -> None:
    """Held-out losses by document at step 0 and at the end; the first documents of each source changed most."""
    rng = np.random.default_rng(7)
    paths = RunDir(root)
    tokens = {name: rng.integers(50, 400, documents) for name in ("prose", "python")}
    noise = {name: rng.normal(0, 0.2, documents) for name in tokens}
    for step in (0, story.steps):
        columns: dict[str, list[Any]] = {"source": [], "document": [], "tokens": [], "nats": []}
        for name, level in zip(("prose", "python"), _losses(story, step), strict=True):
            moved = np.linspace(0.3, -0.3, documents) * (step > 0)
            columns["source"] += [name] * documents
            columns["document"] += list(range(documents))
            columns["tokens"] += tokens[name].tolist()
            columns["nats"] += (tokens[name] * (level + noise[name] + moved)).tolist()
        write_pieces(pieces_file(paths.evals, step), pa.table(columns))
    texts = {name: {n: text.format(n=n) for n in range(documents)} for name in tokens}
    write_document_texts(document_texts_file(paths.evals), texts)
