"""Which checkpoints are kept, reduced to their weights, or deleted, and which are pinned. No torch.

``decide`` is a function of what lies in the folder, of held-out losses by step, of pins, and of the policy; nothing
else: not of how often a run saves or evaluates, nor of what was decided before. ``apply`` carries it out.

    full checkpoints 100 200 300 400, keep_last 2, keep_weights_every 200, lowest loss after step 100
    -> 100 is kept (best), 200 is reduced to its weights, 300 and 400 are kept (window)

The newest usable full checkpoint is never deleted, whatever the policy says. Weights kept for good are never deleted
either. Usable means that every promised file is there in its size: a folder that merely claims to be complete must
not push out one that is. Copies that were uploaded are not looked at.

A pin is a small file beside the checkpoints, ``pins/NAME.json``, by which another process, on whatever host, keeps one
of them as it is for as long as the file says so: a watcher pins the best by its suite. One that cannot be read keeps
all of them: nothing is deleted on a guess.
"""

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cpt.checkpoint.marker import delete_checkpoint, is_full, read_json, read_marker, reduce_to_weights
from cpt.rundir import DataError, step_name, step_of, write_atomic

Kind = Literal["full", "weights", "broken"]  # broken: cut short, damaged or being written
Action = Literal["keep", "reduce", "delete"]


@dataclass(frozen=True)
class Policy:
    """``keep_last`` full checkpoints; of steps that ``keep_weights_every`` divides, the weights for good."""

    keep_last: int
    keep_weights_every: int | None = None


@dataclass(frozen=True)
class Pin:
    """One checkpoint that stays as it is, and why."""

    step: int
    reason: str


def decide(
    found: Mapping[int, Kind],
    policy: Policy,
    *,
    losses: Mapping[int, float] | None = None,
    pinned: AbstractSet[int] = frozenset(),
    busy: AbstractSet[int] = frozenset(),
) -> dict[int, Action]:
    """What becomes of each checkpoint, by step. The one of the lowest of ``losses`` (held-out, by step) stays, and so
    do ``pinned`` ones; ``busy`` ones are being uploaded or evaluated and stay for now.

    A broken folder goes only if a full checkpoint is newer: it may be being written, or be all there is.
    """
    full = sorted(step for step, kind in found.items() if kind == "full")
    if not full:
        return dict.fromkeys(found, "keep")
    kept = set(full[-max(1, policy.keep_last) :]) | pinned | busy | _best(found, losses or {})
    return {step: _action(step, kind, policy, kept=kept, newest=full[-1]) for step, kind in found.items()}


def _best(found: Mapping[int, Kind], losses: Mapping[int, float]) -> set[int]:
    """The complete checkpoint of the lowest loss, the newer one of two equals."""
    measured = [(losses[step], -step) for step, kind in found.items() if kind != "broken" and step in losses]
    return {-min(measured)[1]} if measured else set()


def _action(step: int, kind: Kind, policy: Policy, *, kept: AbstractSet[int], newest: int) -> Action:
    if kind == "broken":
        return "delete" if step < newest and step not in kept else "keep"
    if kind == "weights" or step in kept:
        return "keep"
    every = policy.keep_weights_every
    return "reduce" if every and step % every == 0 else "delete"


def write_pin(checkpoints: Path, name: str, pin: Pin) -> None:
    """Pin a checkpoint under a name; the one that had this pin before loses it."""
    path = _pins(checkpoints) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps(asdict(pin)) + "\n")


def read_pins(checkpoints: Path) -> dict[str, Pin]:
    """All pins by name.

    Raises:
        DataError: a file that is none.
    """
    found = {}
    for path in sorted(_pins(checkpoints).glob("*.json")):
        raw = read_json(path)
        if raw.keys() != {"step", "reason"} or type(raw["step"]) is not int or not isinstance(raw["reason"], str):
            raise DataError(f"{path}: not a pin, which has a step and a reason; delete it")
        found[path.stem] = Pin(raw["step"], raw["reason"])
    return found


def _pins(checkpoints: Path) -> Path:
    return checkpoints / "pins"


def survey(checkpoints: Path) -> dict[int, Kind]:
    """What lies in a run's checkpoint folder, by step; folders of other names are left out."""
    found: dict[int, Kind] = {}
    for folder in checkpoints.glob("step_*"):
        step = step_of(folder)
        if step is not None and folder.is_dir():
            found[step] = _kind(folder)
    return found


def _kind(folder: Path) -> Kind:
    try:
        return "full" if is_full(read_marker(folder)) else "weights"
    except DataError:
        return "broken"


def apply(checkpoints: Path, actions: Mapping[int, Action]) -> dict[str, list[str]]:
    """Carry out, oldest first; returns the names of what was ``pruned`` and ``reduced``.

    Raises:
        OSError: a folder cannot be changed. What was not yet done is left for the next time.
    """
    done: dict[str, list[str]] = {"pruned": [], "reduced": []}
    for step, action in sorted(actions.items()):
        folder = checkpoints / step_name(step)
        if action == "delete":
            delete_checkpoint(folder)
            done["pruned"].append(folder.name)
        elif action == "reduce":
            reduce_to_weights(folder)
            done["reduced"].append(folder.name)
        elif _kind(folder) == "weights" and any(folder.glob("shard_*.state.safetensors")):
            reduce_to_weights(folder)  # was cut short before: sweep up
    return done
