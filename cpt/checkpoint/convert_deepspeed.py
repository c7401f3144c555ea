"""DeepSpeed's own checkpoint folders, read and written without DeepSpeed: ``global_stepN`` of ZeRO 0 to 3, and its
universal format.

Owns where their files keep fp32 masters and optimizer state (read off DeepSpeed 0.19.8):

    ZeRO 0     mp_rank_00_model_states.pt: weights by name; the optimizer's state by number
    ZeRO 1, 2  a file per rank: one flat range per parameter group, with the slice of it that is each parameter's
    ZeRO 3     a file per rank: each parameter's n-th part, ceil(numel / ranks) elements, one behind the other
    universal  zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt: each parameter whole; read by DeepSpeed under ZeRO 1 to 3 and
               any number of ranks, with ``"checkpoint": {"load_universal": true}``

These are pickles, so they are read by torch's weights-only reader, which builds tensors and plain containers and
nothing else; the three classes of DeepSpeed that its files name are replaced by an empty one. What needs more than that
is refused, and so are tensor and expert parallelism, frozen parameters and folders without optimizer state.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cpt.checkpoint.portable import Checkpoint, Fragment
from cpt.rundir import DataError

LAYOUT = "0.19.8"  # the version of DeepSpeed whose files these are
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # ZeRO 0 to 2, ZeRO 3
INERT = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)
ANY_GROUPS = 256  # DeepSpeed pairs its parameter groups with these, and an empty one changes nothing in its partner
_FOLDER_NAME = re.compile(r"(?!\.\.?\Z)[\w.-]+")  # names in a checkpoint may not lead out of the folder
_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")


class Inert:
    """Stands for any class of DeepSpeed that a file names: takes whatever it is built from and does nothing with it."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts


@dataclass(frozen=True)
class DeepSpeedFolder:
    """What a folder holds, its tensors still on disk."""

    path: Path
    step: int
    shapes: dict[str, list[int]]
    kind: str  # "ZeRO 2 of 4 ranks", for people
    parts: tuple[Path, ...] = ()  # a file per rank; empty for ZeRO 0 and universal
    model: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        return max(1, len(self.parts))


def open_deepspeed(path: Path) -> DeepSpeedFolder:
    """``path``: a ``global_stepN`` folder, or the one around it that says which in ``latest``.

    Raises:
        DataError: no such folder, or one that cannot be converted, and why.
    """
    folder = _tagged(path)
    files = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    if not files:
        rule = f"holds no {MODEL_FILES[0]}, so it is no checkpoint folder of DeepSpeed"
        raise DataError(f"{folder}: {rule}; give the global_stepN folder, or the one that holds it and latest")
    _refuse_other_parallelism(folder)
    model = read_plain(files[0])
    step = int(model.get("global_steps", 0))
    if (folder / "zero").is_dir():
        shapes = {param.parent.name: _shape(param) for param in sorted((folder / "zero").glob("*/fp32.pt"))}
        return DeepSpeedFolder(folder, step, shapes, "universal", model={})
    if model.get("frozen_param_shapes"):
        raise DataError(f"{folder}: some of its parameters are frozen, and a checkpoint of cpt holds trained ones only")
    parts = _parts(folder)
    if not parts:
        shapes = {name: list(model["module"][name].shape) for name in _named_once(model["module"])}
        return DeepSpeedFolder(folder, step, shapes, "ZeRO 0", model=model)
    shapes = {name: list(shape) for group in model["param_shapes"] for name, shape in group.items()}
    stage = "3" if files[0].name == MODEL_FILES[1] else "1 or 2"
    return DeepSpeedFolder(folder, step, shapes, f"ZeRO {stage} of {len(parts)} ranks", parts, model)


def shards(folder: DeepSpeedFolder) -> Iterator[tuple[list[Fragment], int]]:
    """(fragments, updates that the moments have seen) of one shard after the other: one file's content in memory.

    Raises:
        DataError: what is in the files does not add up to the parameters that they name.
    """
    if folder.kind == "universal":
        yield _universal_fragments(folder)
    elif not folder.parts:
        yield _whole_fragments(folder)
    else:
        reader = _sharded_3 if folder.kind.startswith("ZeRO 3") else _Sliced(folder)
        for rank, part in enumerate(folder.parts):
            yield reader(folder, rank, read_plain(part)["optimizer_state_dict"])


def write_universal(checkpoint: Checkpoint, out: Path) -> None:
    """A full checkpoint as a folder that ``engine.load_checkpoint(out)`` of DeepSpeed reads under ZeRO 1, 2 and 3.

    Hyperparameters are those of the engine that reads it.

    Raises:
        DataError: a parameter has a name that is no plain folder name.
    """
    if odd := [name for name in checkpoint.meta.parameter_shapes if not _FOLDER_NAME.fullmatch(name)]:
        raise DataError(
            f"{checkpoint.path}: parameter {odd[0]!r:.80} cannot name a folder, which universal format asks"
        )
    tag = f"global_step{checkpoint.meta.step}_universal"
    folder = out / tag / "zero"
    step = torch.tensor(float(checkpoint.meta.optimizer_steps))
    for name in checkpoint.meta.parameter_shapes:
        (folder / name).mkdir(parents=True)
        for kind in checkpoint.kinds[name]:
            stored = "fp32" if kind == "param" else kind
            torch.save({"param": checkpoint.read(name, kind)}, folder / name / f"{stored}.pt")
        torch.save(step, folder / name / "step.pt")
    groups: list[dict[str, Any]] = [{} for _ in range(ANY_GROUPS)]
    state = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(
        {"param_groups": groups, "ds_version": LAYOUT, "optimizer_state_dict": state}, folder / "optimizer_state.pt"
    )
    model: dict[str, Any] = {
        "module": {},
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": checkpoint.meta.step,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": LAYOUT,
    }
    for file in MODEL_FILES:
        torch.save(model, out / tag / file)
    (out / "latest_universal").write_text(tag, encoding="utf-8")


def read_plain(path: Path) -> Any:
    """A pickle's tensors and containers. Raises DataError where it needs more than that."""
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in INERT]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen kinds; none of them has run anything of the file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        rule = f"cannot be read as tensors and plain containers, and nothing else is read from a pickle ({reason})"
        raise DataError(f"{path}: {rule}; save it again from the program that wrote it, as safetensors") from None


def _tagged(path: Path) -> Path:
    for name in ("latest", "latest_universal"):
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8", errors="replace").strip()
            if not _FOLDER_NAME.fullmatch(tag):
                raise DataError(f"{path / name}: names {tag!r:.80}, which is no folder beside it")
            return path / tag
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    return path


def _refuse_other_parallelism(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(("mp_rank_", "zero_pp_rank_")) and "_mp_rank_00_" not in f"_{path.name}":
            raise DataError(f"{path}: this folder was saved with tensor parallelism, which is not converted")
        if "expert_" in path.name or path.name.startswith("layer_"):
            raise DataError(
                f"{path}: this folder was saved with expert or pipeline parallelism, which is not converted"
            )


def _parts(folder: Path) -> tuple[Path, ...]:
    found = {int(match["rank"]): path for path in folder.iterdir() if (match := _OPTIMIZER.fullmatch(path.name))}
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise DataError(f"{folder}: the optimizer states of rank {missing[0]} are missing; copy the folder again")
    return tuple(found[rank] for rank in sorted(found))


def _named_once(module: Mapping[str, torch.Tensor]) -> list[str]:
    """Tied weights stand there under each of their names; the first one counts."""
    seen: set[tuple[int, torch.Size]] = set()
    names = []
    for name, tensor in module.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            names.append(name)
        seen.add(key)
    return names


def _shape(file: Path) -> list[int]:
    return list(read_plain(file)["param"].shape)


def _universal_fragments(folder: DeepSpeedFolder) -> tuple[list[Fragment], int]:
    found, step = [], 0
    for name in folder.shapes:
        here = folder.path / "zero" / name
        state = {"param": read_plain(here / "fp32.pt")["param"].reshape(-1)}
        for file in sorted(here.glob("*.pt")):
            if file.stem not in ("fp32", "step"):
                state[file.stem] = read_plain(file)["param"].reshape(-1)
        if (here / "step.pt").is_file():
            step = int(read_plain(here / "step.pt"))
        found.append(_checked(folder.path, Fragment(name, 0, state)))
    return found, step


def _whole_fragments(folder: DeepSpeedFolder) -> tuple[list[Fragment], int]:
    """ZeRO 0: the optimizer knows its parameters by number, and shapes must tell which is which."""
    module, optimizer = folder.model["module"], folder.model["optimizer"]
    states = optimizer["state"] if optimizer else {}
    if not states:
        raise _no_state(folder.path)
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    found = []
    for number, name in zip(numbers, _in_order(folder, [states[number] for number in numbers]), strict=True):
        state = {"param": module[name].reshape(-1).float()}
        state |= {kind: value.reshape(-1).float() for kind, value in _tensors(states[number], module[name].numel())}
        found.append(_checked(folder.path, Fragment(name, 0, state)))
    return found, _steps(states[numbers[0]])


def _in_order(folder: DeepSpeedFolder, states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names in the optimizer's order: the model's, or matrices before vectors, or the reverse, whichever the shapes
    allow.
    """
    names = list(folder.shapes)
    matrices, vectors = ([n for n in names if (len(folder.shapes[n]) >= 2) is wanted] for wanted in (True, False))
    for order in (names, matrices + vectors, vectors + matrices):
        shapes = [next((list(v.shape) for _, v in _tensors(state, None)), None) for state in states]
        if shapes == [folder.shapes[name] for name in order]:
            return order
    rule = "its optimizer numbers the parameters in an order that their shapes do not tell"
    raise DataError(f"{folder.path}: {rule}; save it under ZeRO 1, which keeps their names")


class _Sliced:
    """ZeRO 1 and 2: ranks hold one range of each group, cut anywhere; a parameter goes on in the next rank's."""

    def __init__(self, folder: DeepSpeedFolder) -> None:
        self._next = dict.fromkeys(folder.shapes, 0)  # elements that earlier ranks held

    def __call__(self, folder: DeepSpeedFolder, rank: int, saved: Mapping[str, Any]) -> tuple[list[Fragment], int]:
        mappings, flats = saved.get("param_slice_mappings"), saved["single_partition_of_fp32_groups"]
        states = saved["base_optimizer_state"]
        states = states.get("state") if isinstance(states, dict) else None
        if mappings is None or not states:
            raise _no_state(folder.parts[rank])
        found = []
        for group, (mapping, flat) in enumerate(zip(mappings, flats, strict=True)):
            held = {"param": flat, **dict(_tensors(states[group], flat.numel()))}
            for name, address in mapping.items():
                span = slice(address.start, address.start + address.numel)
                state = {kind: tensor.reshape(-1)[span].float() for kind, tensor in held.items()}
                found.append(_checked(folder.parts[rank], Fragment(name, self._next[name], state)))
                self._next[name] += address.numel
        return found, _steps(states[0])


def _sharded_3(folder: DeepSpeedFolder, rank: int, saved: Mapping[str, Any]) -> tuple[list[Fragment], int]:
    flats, states = saved.get("fp32_flat_groups"), saved.get("optimizer_state_dict", {}).get("state")
    if not flats or not states:
        raise _no_state(folder.parts[rank])
    kinds = [kind for kind, _ in _tensors(states[0], flats[0].numel())]
    held = {"param": torch.cat([flat.reshape(-1) for flat in flats])}
    held |= {kind: torch.cat([states[i][kind].reshape(-1) for i in range(len(flats))]) for kind in kinds}
    found, offset = [], 0
    for name, shape in folder.shapes.items():
        part = -(-math.prod(shape) // len(folder.parts))
        real = max(0, min(part, math.prod(shape) - part * rank))
        if real:
            state = {kind: tensor[offset : offset + real].float() for kind, tensor in held.items()}
            found.append(_checked(folder.parts[rank], Fragment(name, part * rank, state)))
        offset += part
    if offset != held["param"].numel():
        rule = f"holds {held['param'].numel()} elements, its parameters have {offset}"
        raise DataError(f"{folder.parts[rank]}: {rule}; was it saved with sub-groups of another order?")
    return found, _steps(states[0])


def _tensors(state: Mapping[str, Any], numel: int | None) -> Iterator[tuple[str, torch.Tensor]]:
    """What an optimizer keeps of each element."""
    for kind, value in state.items():
        if isinstance(value, torch.Tensor) and kind != "step" and numel in (None, value.numel()):
            yield kind, value


def _steps(state: Mapping[str, Any]) -> int:
    return int(state.get("step", 0))


def _checked(path: Path, fragment: Fragment) -> Fragment:
    if any(tensor.numel() != fragment.numel for tensor in fragment.state.values()):
        raise DataError(f"{path}: weights and optimizer state of {fragment.name} differ in length; copy it again")
    return fragment


def _no_state(path: Path) -> DataError:
    rule = "holds no optimizer state that belongs to named parameters"
    return DataError(f"{path}: {rule}; export its weights to safetensors and convert those")
