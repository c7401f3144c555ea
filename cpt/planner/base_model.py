"""What can be known of a base model from its files alone: its name in observations, and its number of parameters.

Reads a Hugging Face folder's ``config.json`` or a checkpoint's ``meta.json``. Refuses nothing: what is not known is
None, and the caller knows whether that matters.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from cpt.model.size import num_parameters
from cpt.report.reading import parse_object
from cpt.rundir import RunDir

FRESH = "fresh"  # the base of a run that starts from random weights


def base_name(init_from: str | None) -> str:
    """``.../quickstart/base_hf -> quickstart/base_hf``, ``runs/A/checkpoints/step_00000500 -> A/step_00000500``.

    The last folder alone would not do: half of all bases are called the same. A hub name is its own name.
    """
    if init_from is None:
        return FRESH
    parts = [part for part in Path(init_from).parts if part not in ("/", "checkpoints")]
    return "/".join(parts[-2:])


def params_of_base(init_from: str) -> int | None:
    """Parameters of a local model or checkpoint; None for a hub name and for a family without a closed form."""
    folder = Path(init_from)
    meta = _read(folder / "meta.json")
    return _params_of_meta(meta) if meta else _params_of_config(_read(folder / "config.json"))


def params_of_run(run_dir: Path, model: Mapping[str, Any]) -> int | None:
    """Parameters of a run's model: as its newest checkpoint states them, else from where the run began.

    ``model`` is the section of the run's config.
    """
    checkpoints = sorted(RunDir(run_dir).checkpoints.glob("step_*/meta.json"), reverse=True)
    for path in checkpoints:
        if (found := _params_of_meta(_read(path))) is not None:
            return found
    init_from, fresh = model.get("init_from"), model.get("fresh")
    if init_from:
        return params_of_base(str(init_from))
    return _params_of_config(fresh) if isinstance(fresh, Mapping) else None


def _params_of_meta(meta: Mapping[str, Any]) -> int | None:
    shapes = meta.get("parameter_shapes")
    return sum(prod(shape) for shape in shapes.values()) if isinstance(shapes, dict) and shapes else None


def _params_of_config(config: Mapping[str, Any]) -> int | None:
    try:
        return num_parameters(config)
    except (KeyError, TypeError, ZeroDivisionError):  # another family's keys, or a file that is no model's config
        return None


def _read(path: Path) -> dict[str, Any]:
    return (parse_object(path.read_bytes()) or {}) if path.is_file() else {}
