"""What a run says of itself before it starts: the plan, the model and its cost, where each source stands, and the
environment.
"""

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cpt.fit_memory import render_cost, setting_of
from cpt.model import size
from cpt.model.active import count_matmul_weights
from cpt.model.build import LoadedModel
from cpt.model.memory import Prediction, predict_memory
from cpt.prepare import Prepared, plan_facts, render_plan
from cpt.train.engine import Topology

SAME_SIZE = 1.5  # a model larger or smaller by more than this factor is another model than the recommendation's
PACKAGES = ("cpt", "torch", "deepspeed", "transformers", "numpy")


@dataclass(frozen=True)
class Cost:
    """What the model costs to train."""

    flops_per_token: int | None  # None: a family whose layout is not known
    flops: size.Flops | None  # what MFU is measured with
    memory: Prediction | None


def announce(prepared: Prepared, loaded: LoadedModel, topology: Topology) -> None:
    """Print the plan, the model and its cost."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(render_plan(plan_facts(prepared)))
    for warning in size_warnings(prepared, loaded):
        console.print(warning)
    console.print(loaded.report.render())
    console.print(trained_parameters(loaded.model))
    cost = cost_of(prepared, loaded, topology)
    console.print(render_cost(loaded.report.parameters, cost.flops_per_token, cost.memory))


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


def cost_of(prepared: Prepared, loaded: LoadedModel, topology: Topology) -> Cost:
    """FLOPs per token and memory per rank, by formula; where a family has none, FLOPs by the weights of the model."""
    config, model = prepared.config, model_config(loaded)
    setting = setting_of(config, model, world_size=topology.world_size, on_gpu=topology.on_gpu)
    return Cost(
        flops_per_token=size.flops_per_token(model, config.data.seq_len, num_params=loaded.report.parameters),
        flops=size.exact_flops(model, matmul_weights=count_matmul_weights(loaded.model, model)),
        memory=predict_memory(model, setting),
    )


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
