"""The pilot file: which small runs tell how the share of general data and the token budget move both losses.

Owns the fields and how they become a list of runs: every base x share x seed is a trunk with its branches (see
``cpt.planner.budget``). A pilot is a run like any other, from a template run file; a pilot file changes in it what a
pilot must differ in (name, base, share, seed, tokens, schedule, evaluations, checkpoints) and nothing else. Refuses
unknown keys with the nearest known name, a base whose size cannot be known, and what the template itself is refused
for; all problems at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from cpt.config import ConfigError, Problem, RunConfig, load_config, read_mapping, validate
from cpt.planner.base_model import base_name, params_of_base
from cpt.planner.budget import Ladder, evaluation_steps, ladder_for_flops, ladder_for_tokens, run_flops
from cpt.problems import problem_of
from cpt.schedule_fields import Count, Section, Share, Steps

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class FullRunSection(Section):
    tokens: Count = Field(description="tokens of the full run that the pilots are for")
    params: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="parameters of the full run's model; default: the largest base"
    )


class PilotsSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="name of the folder")
    dir: Path = Field(Path("runs"), description="folder that holds it")
    run: Path = Field(description="template run file: stores, model, batch and learning rate")
    overrides: dict[str, Any] = Field(default_factory=dict, description="dotted fields to change in the template")
    bases: tuple[str, ...] = Field(
        (), description="models to continue, of one size or several; default: the template's"
    )
    shares_general: tuple[Share, ...] = Field(
        (0.05, 0.1, 0.25, 0.5, 0.75), min_length=1, description="shares of general tokens to try"
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (), description="data orders to try, for a measure of noise; default: the template's"
    )
    budgets: tuple[Count, ...] = Field((), description="token budgets, whole multiples of the smallest; or give full")
    full: FullRunSection | None = Field(None, description="the run that the pilots are for; sizes the budgets")
    budget_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.02, description="FLOPs of all pilots together over those of the full run, where budgets are not given"
    )
    num_budgets: Annotated[int, Field(ge=1, le=8)] = Field(3, description="token budgets, each twice the one before")
    warmup_steps: Steps | None = Field(None, description="linear warm-up; default: 5% of the smallest budget's steps")
    decay_share: Fraction = Field(0.2, description="decay of a budget over its steps")
    decay: Literal["linear", "sqrt", "square", "cosine"] = Field("sqrt", description="shape of the decay")
    min_lr_ratio: Share = Field(0.1, description="final rate over peak rate")
    evals_per_run: Annotated[int, Field(ge=1)] = Field(8, description="evaluations of a trunk at its constant rate")
    slots: Annotated[int, Field(ge=1)] = Field(2, description="runs at a time on this machine")
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="GPUs dealt out to the slots, one each; default: every run sees all of them and takes the first"
    )
    nproc: Annotated[int, Field(ge=1)] = Field(
        1, description="processes, and GPUs, of one run, for models that need several; such runs go one at a time"
    )


class PilotsFile(Section):
    pilots: PilotsSection


@dataclass(frozen=True)
class Pilot:
    """One run of the grid. A branch has a ``trunk``, and takes over its state after ``first_step``."""

    name: str
    config: RunConfig
    share_general: float
    multiple: int
    params: int
    first_step: int
    trunk: str | None = None

    @property
    def base(self) -> str:
        return base_name(self.config.model.init_from)

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def num_steps(self) -> int:
        return self.config.train.tokens // self.config.train.global_batch_tokens

    @property
    def flops(self) -> float:
        """What this run itself computes: a branch only its decay."""
        return run_flops(self.params, (self.num_steps - self.first_step) * self.config.train.global_batch_tokens)


@dataclass(frozen=True)
class Grid:
    """All runs of a pilot file, each trunk before its branches."""

    file: Path
    settings: PilotsSection
    template: RunConfig
    ladder: Ladder
    pilots: tuple[Pilot, ...]

    @property
    def root(self) -> Path:
        return Path.cwd() / self.settings.dir.expanduser() / self.settings.name

    @property
    def observations(self) -> Path:
        return self.root / "observations.csv"

    @property
    def facts(self) -> Path:
        """What the grid is and costs, and which learning rate it holds for."""
        return self.root / "pilots.json"

    def log(self, pilot: Pilot) -> Path:
        return self.root / "logs" / f"{pilot.name}.log"

    def run_file(self, pilot: Pilot) -> Path:
        return self.root / "run_files" / f"{pilot.name}.yaml"

    def branches(self, trunk: Pilot) -> list[Pilot]:
        return [pilot for pilot in self.pilots if pilot.trunk == trunk.name]

    def pilot(self, name: str) -> Pilot:
        """Raises ConfigError: no run of that name."""
        for pilot in self.pilots:
            if pilot.name == name:
                return pilot
        rule = f"is no run of this grid ({', '.join(pilot.name for pilot in self.pilots)})"
        raise ConfigError(Problem("--only", name, rule))


def load_pilots(path: Path) -> Grid:
    """Read a pilot file and its template.

    Raises:
        ConfigError: with every problem found.
    """
    raw = read_mapping(path)
    settings, problems = _validated(raw)
    try:
        template = _load_template(raw)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    assert settings is not None
    settings = _with_defaults(settings, template)
    sizes = _sizes(settings)
    ladder = _ladder(settings, sizes, template.train.global_batch_tokens)
    _check_warmup(settings, ladder)
    return Grid(path, settings, template, ladder, _pilots(settings, template, ladder, sizes))


def _validated(raw: Mapping[str, Any]) -> tuple[PilotsSection | None, list[Problem]]:
    try:
        settings = PilotsFile.model_validate(raw).pilots
    except ValidationError as error:
        return None, [problem_of(detail, _fields()) for detail in error.errors()]
    problems = []
    if bool(settings.budgets) == (settings.full is not None):
        rule = "give either the token budgets or the full run that sizes them"
        problems.append(Problem("pilots.budgets", list(settings.budgets), rule, "pilots.full needs tokens alone"))
    if settings.nproc > 1 and (settings.slots > 1 or settings.gpus):
        rule = "runs of several processes take all GPUs of the machine"
        problems.append(
            Problem("pilots.nproc", settings.nproc, rule, "set pilots.slots to 1 and leave out pilots.gpus")
        )
    if settings.gpus and len(settings.gpus) < settings.slots:
        rule = f"names fewer GPUs than there are slots ({settings.slots})"
        problems.append(Problem("pilots.gpus", list(settings.gpus), rule, "one GPU for each; a GPU may be named twice"))
    for name in ("bases", "shares_general", "seeds"):
        values = list(getattr(settings, name))
        if len(set(values)) < len(values):
            problems.append(
                Problem(f"pilots.{name}", values, "names one value twice", "every run of a grid is another")
            )
    return settings, problems


def _fields() -> dict[str, str]:
    found = {f"pilots.{name}": info.description or "" for name, info in PilotsSection.model_fields.items()}
    full = {f"pilots.full.{name}": info.description or "" for name, info in FullRunSection.model_fields.items()}
    return {"pilots": "the section that holds everything", **found, **full}


def _load_template(raw: Mapping[str, Any]) -> RunConfig:
    """The template with the overrides; a stand-in where the pilot file does not say which (that is told already)."""
    section = raw.get("pilots")
    section = section if isinstance(section, Mapping) else {}
    path, overrides = section.get("run"), section.get("overrides") or {}
    if not isinstance(path, str) or not isinstance(overrides, Mapping):
        raise ConfigError()
    texts = [f"{field}={yaml.safe_dump(value, default_flow_style=True)}" for field, value in overrides.items()]
    texts.append("plan=null")  # a plan that the template follows is what these pilots are to make
    try:
        return load_config(Path(path).expanduser(), texts)
    except ConfigError as error:
        named = (
            replace(one, field=one.field if one.field == path else f"{path}: {one.field}") for one in error.problems
        )
        raise ConfigError(*named) from None


def _with_defaults(settings: PilotsSection, template: RunConfig) -> PilotsSection:
    bases = settings.bases or ((template.model.init_from,) if template.model.init_from else ())
    if not bases:
        rule = "pilots continue a model, and the template starts a fresh one"
        raise ConfigError(Problem("pilots.bases", None, rule, "give bases, or model.init_from in the template"))
    local = [Path.cwd() / Path(base).expanduser() for base in bases]
    found = tuple(str(path) if path.exists() else base for path, base in zip(local, bases, strict=True))
    return settings.model_copy(update={"bases": found, "seeds": settings.seeds or (template.run.seed,)})


def _sizes(settings: PilotsSection) -> dict[str, int]:
    """Parameters of each base. Raises ConfigError for every one that cannot be known."""
    sizes = {base: params_of_base(base) for base in settings.bases}
    rule = "its number of parameters cannot be known here: no folder with a config.json or meta.json of a known family"
    fix = "make it first, or download it and give its folder"
    if problems := [Problem("pilots.bases", base, rule, fix) for base, params in sizes.items() if not params]:
        raise ConfigError(*problems)
    return {base: params for base, params in sizes.items() if params}


def _ladder(settings: PilotsSection, sizes: Mapping[str, int], step_tokens: int) -> Ladder:
    if settings.full is None:
        return ladder_for_tokens(settings.budgets, step_tokens=step_tokens, decay_share=settings.decay_share)
    return ladder_for_flops(
        settings.budget_fraction * full_flops(settings, sizes),
        list(sizes.values()),
        cells_per_model=len(settings.shares_general) * len(settings.seeds),
        step_tokens=step_tokens,
        num_budgets=settings.num_budgets,
        decay_share=settings.decay_share,
    )


def full_flops(settings: PilotsSection, sizes: Mapping[str, int]) -> float:
    """FLOPs of the run that the pilots are for; NaN where the file names none."""
    if settings.full is None:
        return float("nan")
    return run_flops(settings.full.params or max(sizes.values()), settings.full.tokens)


def _warmup_steps(settings: PilotsSection, ladder: Ladder) -> int:
    return max(1, round(0.05 * ladder.total_steps(1))) if settings.warmup_steps is None else settings.warmup_steps


def _check_warmup(settings: PilotsSection, ladder: Ladder) -> None:
    if (warmup := _warmup_steps(settings, ladder)) >= ladder.stable_steps:
        rule = f"the smallest budget has only {ladder.stable_steps} steps before its decay"
        raise ConfigError(Problem("pilots.warmup_steps", warmup, rule, "shorten it or raise the budget"))


def _pilots(
    settings: PilotsSection, template: RunConfig, ladder: Ladder, sizes: Mapping[str, int]
) -> tuple[Pilot, ...]:
    found = []
    for number, base in enumerate(settings.bases, start=1):
        for share in settings.shares_general:
            for seed in settings.seeds:
                parts = [settings.name, f"base{number}" if len(sizes) > 1 else "", f"general{share:.6g}"]
                parts.append(f"seed{seed}" if len(settings.seeds) > 1 else "")
                cell = (base, share, seed, "_".join(filter(None, parts)))
                found += _cell(settings, template, ladder, cell, sizes[base])
    return tuple(found)


def _cell(
    settings: PilotsSection, template: RunConfig, ladder: Ladder, cell: tuple[str, float, int, str], params: int
) -> list[Pilot]:
    """The trunk, and the branches from the shortest on. ``cell``: base, share, seed and the start of the names."""
    base, share, seed, prefix = cell
    *smaller, largest = ladder.multiples
    names = {multiple: f"{prefix}_{ladder.total_steps(multiple)}steps" for multiple in ladder.multiples}
    made = []
    for multiple in (largest, *smaller):
        own = {"name": names[multiple], "dir": str(_runs_folder(settings)), "seed": seed}
        changes = _changes(settings, template, ladder, multiple)
        raw = template.model_dump(mode="json")
        raw["plan"] = None
        raw["run"] |= own
        raw["model"] |= {"init_from": base, "fresh": None}
        raw["data"] |= {"stages": []}
        raw["replay"] |= {"share_general": share}
        for section in changes:
            raw[section] |= changes[section]
        first_step, trunk = (0, None) if multiple == largest else (ladder.branch_step(multiple), names[largest])
        made.append(Pilot(names[multiple], validate(raw), share, multiple, params, first_step, trunk))
    return made


def _changes(settings: PilotsSection, template: RunConfig, ladder: Ladder, multiple: int) -> dict[str, dict[str, Any]]:
    """What makes the template a run of one token budget."""
    warmup, steps = _warmup_steps(settings, ladder), ladder.total_steps(multiple)
    is_trunk = multiple == ladder.multiples[-1]
    schedule = {
        "name": "wsd",
        "warmup_steps": warmup,
        "decay_steps": steps - ladder.branch_step(multiple),
        "decay": settings.decay,
        "min_lr_ratio": settings.min_lr_ratio,
    }
    # Not before twice the warm-up: the first losses at the peak rate tell of the re-warming, not of the mixture.
    first = min(max(1, 2 * warmup), ladder.branch_step(multiple))
    at_steps = evaluation_steps(first, ladder.branch_step(multiple), settings.evals_per_run)
    # A trunk keeps all it saves: a branch may be started long after, as a job of its own.
    every, saves = ladder.stable_steps, ladder.trunk_steps // ladder.stable_steps + 1
    return {
        "train": {"tokens": steps * template.train.global_batch_tokens, "schedule": schedule},
        "eval": {
            "every_steps": None,
            "at_steps": list(at_steps) if is_trunk else [],
            "suite": None,  # a pilot is read by its losses
            "suite_steps": "geometric",
        },
        "checkpoint": {"every_steps": every, "keep_last": saves} if is_trunk else {"every_steps": None, "keep_last": 1},
    }


def _runs_folder(settings: PilotsSection) -> Path:
    return Path.cwd() / settings.dir.expanduser() / settings.name / "runs"
