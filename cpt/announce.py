"""What a run says of itself before it starts: the plan, the model and its cost, where each source stands, and the
environment.
"""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cpt.data.sampler import tokens_seen
from cpt.model import size
from cpt.model.build import LoadedModel
from cpt.prepare import Prepared, plan_facts, render_plan
from cpt.train.engine import Topology

SAME_SIZE = 1.5  # a model larger or smaller by more than this factor is another model than the recommendation's
PACKAGES = ("cpt", "torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True)
class Cost:
    """What the model costs to train."""

    flops_per_token: int | None  # None: a family whose layout is not known
    memory: size.MemoryEstimate


def announce(prepared: Prepared, loaded: LoadedModel, topology: Topology) -> None:
    """Print the plan, the model and its cost."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(render_plan(plan_facts(prepared)))
    for warning in size_warnings(prepared, loaded):
        console.print(warning)
    console.print(loaded.report.render())
    console.print(trained_parameters(loaded.model))
    cost = cost_of(prepared, loaded, topology)
    console.print(size.render_size(loaded.report.parameters, cost.flops_per_token, cost.memory))


def trained_parameters(model: torch.nn.Module) -> str:
    """Which groups of parameters the optimizer moves; a head that is not trained by mistake shows here."""
    known: Any = model
    embeddings, head = known.get_input_embeddings(), known.get_output_embeddings()
    tied = head is not None and embeddings is not None and head.weight is embeddings.weight
    names = {id(p): "head" for p in (head.parameters() if head is not None else ())}
    names |= {id(p): "embeddings and head (tied)" if tied else "embeddings" for p in embeddings.parameters()}
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for parameter in model.parameters():
        group = names.get(id(parameter)) or ("blocks" if parameter.dim() > 1 else "norms and biases")
        counts = trained if parameter.requires_grad else frozen
        counts[group] = counts.get(group, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO 3 shards
    line = "trained: " + ", ".join(f"{group} {count:,}" for group, count in trained.items())
    return line + ("; FROZEN: " + ", ".join(f"{group} {count:,}" for group, count in frozen.items()) if frozen else "")


def size_warnings(prepared: Prepared, loaded: LoadedModel) -> list[str]:
    """A recommendation holds for the size it was asked for; the laws were not asked about this one."""
    recommendation, parameters = prepared.recommendation, loaded.report.parameters
    if recommendation is None or 1 / SAME_SIZE <= parameters / recommendation.params <= SAME_SIZE:
        return []
    return [
        f"the recommendation is for {recommendation.params:,.0f} parameters, this model has {parameters:,}: its share "
        f"and its promised losses are for another model; ask again with cpt plan recommend --params {parameters}"
    ]


def announce_resume(prepared: Prepared, step: int, skipped: Sequence[str]) -> None:
    """Say which checkpoints could not be used, and where each source stands."""
    plan = prepared.plan
    for reason in skipped:
        print(f"checkpoint skipped: {reason}", flush=True)
    seen = tokens_seen(plan, step)
    one_pass = {source.name: source.num_rows * plan.seq_len for source in plan.sources}
    position = ", ".join(
        f"{name} {tokens:,} of {one_pass[name]:,} tokens (epoch {tokens / one_pass[name]:.2f})"
        for name, tokens in seen.items()
    )
    print(f"resumes after step {step} of {plan.num_steps}: {position}", flush=True)


def cost_of(prepared: Prepared, loaded: LoadedModel, topology: Topology) -> Cost:
    """FLOPs per token and memory per rank, by formula."""
    config, model = prepared.config, model_config(loaded)
    seq_len, precision = config.data.seq_len, config.train.precision
    micro = config.train.micro_batch_size
    kept = size.activation_bytes(model, seq_len=seq_len, micro_batch_size=micro, precision=precision)
    memory = size.training_memory_bytes(
        loaded.report.parameters,
        zero_stage=config.deepspeed.zero_stage,
        world_size=topology.world_size,
        precision=precision,
        activations=kept or 0,
    )
    return Cost(size.flops_per_token(model, seq_len, num_params=loaded.report.parameters), memory)


def model_config(loaded: LoadedModel) -> dict[str, Any]:
    """The model's Hugging Face config as plain JSON, every field of it."""
    config: Any = loaded.model.config
    return dict(json.loads(config.to_json_string(use_diff=False)))


def environment(topology: Topology) -> dict[str, object]:
    """What is needed to make sense of the numbers later; no host names, no environment variables, no secrets."""
    device = (
        torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else platform.processor() or "cpu"
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "device": device,
        "world_size": topology.world_size,
        "command": _command(),
        "threads": torch.get_num_threads(),
    }


@cache
def _git_commit() -> str | None:
    """The commit of this checkout; None for an installed package, or where there is no git."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def _command() -> str:
    """How this process was started, in words that can be typed again."""
    as_verb = Path(sys.argv[0]).name != "main.py"
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    return shlex.join([*(["cpt"] if as_verb else ["python", "-m", "cpt.train.main"]), *arguments])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
