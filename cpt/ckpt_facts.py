"""What lies in a checkpoint, for people and programs: ``cpt ckpt inspect`` and ``cpt ckpt verify``.

Owns the facts and their tables. Opens what can be opened and says of the rest why it cannot. Refuses to judge by names
or times: what is complete, and whether it is whole, its marker and its content decide.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt.checkpoint.marker import META
from cpt.checkpoint.portable import Checkpoint, step_folders
from cpt.checkpoint.retention import Kind, read_pins, survey
from cpt.eval.records import EvalRecord, read_eval
from cpt.planner.wording import Facts, amount
from cpt.rundir import DataError, RunDir, step_of
from cpt.runfolder import read_run_config

Say = Callable[[str], None]


@dataclass(frozen=True)
class ParameterFacts:
    """One parameter: its shape, and the Euclidean norms of its weights and of what the optimizer keeps of them."""

    shape: list[int]
    norms: dict[str, float]


def inspect(path: Path, *, params: bool = False) -> dict[str, Any]:
    """Facts of one checkpoint folder, or of every checkpoint of a run folder, oldest first; reads no tensor unless
    ``params``.

    Raises:
        DataError: neither a checkpoint folder nor a run folder.
    """
    if RunDir(path).config.is_file():
        found = [_facts(folder, params=params) for folder in reversed(step_folders(RunDir(path).checkpoints))]
        there = [facts for facts in found if Path(facts["path"]).is_dir()]  # a run at work gives up others meanwhile
        return {"path": str(path), "checkpoints": [{**facts, **_in_run(path, facts)} for facts in there]}
    if not path.is_dir() or not (step_of(path) is not None or (path / META).is_file()):
        raise DataError(f"{path}: neither a checkpoint folder nor a run folder; give RUN_DIR/checkpoints/step_N")
    return {"path": str(path), "checkpoints": [_facts(path, params=params)]}


def _facts(folder: Path, *, params: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": str(folder), "step": step_of(folder), "bytes": 0, "kind": "broken"}
    try:
        facts["bytes"] = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        checkpoint = Checkpoint.open(folder)
    except (DataError, FileNotFoundError) as error:
        return {**facts, "problem": str(error)}
    meta = checkpoint.meta
    by = {name: meta.written_by.get(name) for name in ("world_size", "zero_stage", "torch", "git_commit")}
    facts |= {
        "kind": "full" if checkpoint.is_full else "weights",
        "problem": None,
        "step": meta.step,
        "tokens_seen": meta.tokens_seen,
        "tokens_by_source": meta.tokens_by_source,
        "parameters": sum(math.prod(shape) for shape in meta.parameter_shapes.values()),
        "state_kinds": sorted({kind for kinds in checkpoint.kinds.values() for kind in kinds} - {"param"}),
        "plan_fingerprint": meta.plan_fingerprint,
        "written_by": by,
    }
    return {**facts, "params": parameters(checkpoint)} if params else facts


def parameters(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        name: asdict(ParameterFacts(shape, {kind: _norm(checkpoint, name, kind) for kind in checkpoint.kinds[name]}))
        for name, shape in checkpoint.meta.parameter_shapes.items()
    }


def _norm(checkpoint: Checkpoint, name: str, kind: str) -> float:
    return float(torch.linalg.vector_norm(checkpoint.read(name, kind), dtype=torch.float64))


def _in_run(run_dir: Path, facts: Facts) -> dict[str, Any]:
    """What the run folder knows of a checkpoint: its held-out losses, and why it is kept."""
    record = _record(RunDir(run_dir).eval_file(facts["step"] or 0))
    losses = {name: source.loss for name, source in record.sources.items()} if record else {}
    return {"losses": losses, "kept_because": _reasons(run_dir, facts)}


def _record(file: Path) -> EvalRecord | None:
    try:
        return read_eval(file)
    except (DataError, OSError):
        return None


def _reasons(run_dir: Path, facts: Facts) -> list[str]:
    policy, found = read_run_config(run_dir).checkpoint, survey(RunDir(run_dir).checkpoints)
    step, full = facts["step"], sorted(step for step, kind in found.items() if kind == "full")
    reasons = []
    if full and step == full[-1]:
        reasons.append("newest")
    elif step in full[-max(1, policy.keep_last) :]:
        reasons.append(f"one of the last {policy.keep_last}")
    if policy.keep_weights_every and facts["kind"] == "weights":
        reasons.append(f"weights of every {policy.keep_weights_every} steps")
    if policy.keep_best and step == _best_step(run_dir, policy.keep_best, found):
        reasons.append(f"lowest loss of {policy.keep_best}")
    pins = read_pins(RunDir(run_dir).checkpoints)
    return reasons + [f"pinned: {pin.reason}" for pin in pins.values() if pin.step == step]


def _best_step(run_dir: Path, name: str, found: Mapping[int, Kind]) -> int | None:
    measured = []
    for step, kind in found.items():
        record = _record(RunDir(run_dir).eval_file(step))
        part = record and (record.sources.get(name) or record.groups.get(name))
        if part and part.loss is not None and kind != "broken":
            measured.append((part.loss, -step))
    return -min(measured)[1] if measured else None


def render_inspection(facts: Facts) -> RenderableType:
    table = Table(title=facts["path"], title_justify="left")
    for column in ("step", "size", "tokens"):
        table.add_column(column, justify="right")
    for column in ("kind", "written by", "tokens by source", "held-out loss", "kept because"):
        table.add_column(column)
    for each in facts["checkpoints"]:
        table.add_row(*(Text(cell) for cell in _row(each)))
    problems = [Text(f"broken: {each['problem']}") for each in facts["checkpoints"] if each["problem"]]
    listed = [_parameter_table(each) for each in facts["checkpoints"] if "params" in each]
    empty = [] if facts["checkpoints"] else [Text("no checkpoint was saved yet")]
    return Group(table, *problems, *listed, *empty)


def _row(facts: Facts) -> Iterator[str]:
    step = "-" if facts["step"] is None else f"{facts['step']:,}"
    if facts["kind"] == "broken":
        yield from (step, size_in_words(facts["bytes"]), "-", "broken", "-", "-", "-", "-")
        return
    by = facts["written_by"]
    yield from (step, size_in_words(facts["bytes"]), amount(facts["tokens_seen"]), facts["kind"])
    yield f"{by['world_size']} ranks, ZeRO {by['zero_stage']}" if by["world_size"] else "conversion"
    yield ", ".join(f"{name} {amount(tokens)}" for name, tokens in facts["tokens_by_source"].items()) or "-"
    losses = facts.get("losses") or {}
    yield ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None) or "-"
    yield ", ".join(facts.get("kept_because") or []) or "-"


def size_in_words(count: int) -> str:
    """Bytes as a disk counts them: ``1.4 GiB``."""
    power = min(4, int(math.log2(max(1, count)) // 10))
    return f"{count / 2 ** (10 * power):.{0 if power == 0 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _parameter_table(facts: Facts) -> Table:
    kinds = ["param", *facts["state_kinds"]]
    table = Table(title=f"parameters after step {facts['step']:,}, fp32; norms", title_justify="left")
    table.add_column("parameter")
    for column in ("shape", *kinds):
        table.add_column(column, justify="right")
    for name, each in facts["params"].items():
        norms = [f"{each['norms'][kind]:.4g}" if kind in each["norms"] else "-" for kind in kinds]
        table.add_row(Text(name), " x ".join(map(str, each["shape"])), *norms)
    return table


def verify(path: Path, say: Say = lambda text: None) -> dict[str, Any]:
    """Read a checkpoint, or every one of a run folder, whole: content against its hashes, every element of every
    parameter exactly once, every value finite.
    """
    folders = [Path(each["path"]) for each in inspect(path)["checkpoints"]]
    found = [(folder, list(_problems(folder, say))) for folder in folders]
    there = [{"path": str(folder), "problems": problems} for folder, problems in found if folder.is_dir()]
    return {"path": str(path), "checkpoints": there, "good": not any(each["problems"] for each in there)}


def _problems(folder: Path, say: Say) -> Iterator[str]:
    try:
        checkpoint = Checkpoint.open(folder)
    except DataError as error:
        yield str(error)
        return
    count = len(checkpoint.files)
    for index in range(count):
        say(f"{folder.name}: reading file {index + 1} of {count}")
        damage = checkpoint.verify(rank=index, world_size=count)
        yield from damage
        if damage:
            return  # what is in damaged files says nothing
    for number, (name, kinds) in enumerate(checkpoint.kinds.items()):
        say(f"{folder.name}: values of parameter {number + 1} of {len(checkpoint.kinds)}")
        for kind in kinds:
            bad = int((~torch.isfinite(checkpoint.read(name, kind))).sum())
            if bad:
                yield f"{folder}: {bad:,} elements of {kind} {name} are not finite numbers"


def render_verification(facts: Facts) -> RenderableType:
    lines = []
    for each in facts["checkpoints"]:
        lines.append(f"{each['path']}: {'DAMAGED' if each['problems'] else 'good'}")
        lines += [f"  {problem}" for problem in each["problems"]]
    return Group(*(Text(line) for line in lines or [f"{facts['path']}: no checkpoint was saved yet"]))
