"""What the quickstart trains: its sizes, its folder, and the run files and the pilot file that it writes.

Owns every number of the quickstart. Pilots and continuations share batch, peak rate, warm-up and the share of the steps
that decay, so that what is predicted from the pilots is meant for the continuations. Trains nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.config import ConfigError, Problem, RunConfig, validate
from cpt.follow import follow_plan
from cpt.planner.budget import Ladder, evaluation_steps, make_ladder
from cpt.rundir import RunDir
from cpt.runfolder import read_run_config

VOCAB_SIZE = 4096
PEAK_LR = 3e-3
WARMUP_STEPS = 2
DECAY_SHARE, DECAY, MIN_LR_RATIO = 0.2, "sqrt", 0.1
PLANNED = "planned"

# name -> share of general data
CONTINUATIONS = {"no_replay": 0.0, "replay_05": 0.05, "replay_50": 0.5}
FRESH = ("base", "from_scratch")  # new models: on general text, and on the domain alone
COMPARED = ("no_replay", "replay_05", PLANNED, "replay_50", "from_scratch")


@dataclass(frozen=True)
class Scale:
    """How much is trained; budgets are multiples of the smallest pilot's ``smallest_steps``."""

    hidden_size: int
    num_layers: int
    seq_len: int
    batch_tokens: int
    micro_batch_size: int
    base_steps: int
    smallest_steps: int
    pilot_multiples: tuple[int, ...]
    pilot_shares: tuple[float, ...]
    multiple: int  # of a continuation
    tolerance: float  # rise of the general loss that the recommendation may cost, relative
    heldout_tokens: int
    num_evals: int

    @property
    def ladder(self) -> Ladder:
        return make_ladder(self.smallest_steps, self.pilot_multiples, decay_share=DECAY_SHARE)

    @property
    def continued_steps(self) -> int:
        return self.ladder.total_steps(self.multiple)

    @property
    def continued_tokens(self) -> int:
        return self.continued_steps * self.batch_tokens


FULL = Scale(
    hidden_size=128,
    num_layers=4,
    seq_len=256,
    batch_tokens=4096,
    micro_batch_size=4,  # with more the logits are too big for malloc to keep
    base_steps=180,
    smallest_steps=12,
    pilot_multiples=(1, 2, 4),
    pilot_shares=(0.0, 0.1, 0.25, 0.5),
    multiple=5,
    tolerance=0.05,
    heldout_tokens=16_384,
    num_evals=5,
)
FAST = Scale(
    hidden_size=64,
    num_layers=2,
    seq_len=128,
    batch_tokens=2048,
    micro_batch_size=8,
    base_steps=120,
    smallest_steps=12,
    pilot_multiples=(1, 2, 3),
    pilot_shares=(0.05, 0.2, 0.5),
    multiple=4,
    tolerance=0.02,
    heldout_tokens=4_096,
    num_evals=4,
)


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

    @property
    def plan(self) -> Path:
        return self.out / "plan.json"

    def rundir(self, name: str) -> RunDir:
        return RunDir(self.out / "runs" / name)

    def run_file(self, name: str) -> Path:
        return self.out / "run_files" / f"{name}.yaml"

    def log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"


def num_steps(job: Quickstart, name: str) -> int:
    return job.scale.base_steps if name == "base" else job.scale.continued_steps


def run_settings(job: Quickstart, name: str) -> dict[str, Any]:
    """The content of a run file; that of ``planned`` leaves budget and share to plan.json."""
    scale, steps = job.scale, num_steps(job, name)
    train: dict[str, Any] = {
        "tokens": steps * scale.batch_tokens,
        "global_batch_tokens": scale.batch_tokens,
        "micro_batch_size": scale.micro_batch_size,
        "peak_lr": PEAK_LR,
        "schedule": _schedule(scale, name),
        "precision": "fp32",
    }
    fresh = {"fresh": _architecture(scale), "tokenizer": str(job.tokenizer)}
    raw: dict[str, Any] = {
        "run": {"name": name, "dir": str(job.out / "runs"), "seed": job.seed},
        "model": fresh if name in FRESH else {"init_from": str(job.base)},
        "data": {"stores": {k: str(v) for k, v in job.stores.items()}, "seq_len": scale.seq_len},
        "replay": {"share_general": 1.0 if name == "base" else CONTINUATIONS.get(name, 0.0)},
        "train": train,
        # Forgetting is fastest at the start, so that is where evaluations are dense.
        "eval": {
            "at_steps": [] if name == "base" else list(evaluation_steps(WARMUP_STEPS, steps // 2, scale.num_evals - 1)),
            "tokens_per_source": scale.heldout_tokens,
        },
        "checkpoint": {"every_steps": max(1, steps // 4), "keep_last": 1},
        "log": {"every_steps": max(1, steps // 20), "wandb": "disabled"},
    }
    if name == PLANNED:
        raw["plan"] = str(job.plan)
        del raw["replay"], train["tokens"]
    return raw


def _schedule(scale: Scale, name: str) -> dict[str, Any]:
    if name == "base":
        return {"name": "rewarm_cosine", "warmup_steps": max(2, scale.base_steps // 20)}
    return {
        "name": "wsd",
        "warmup_steps": WARMUP_STEPS,
        "decay_steps": scale.continued_steps - scale.ladder.branch_step(scale.multiple),
        "decay": DECAY,
        "min_lr_ratio": MIN_LR_RATIO,
    }


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


def pilot_settings(job: Quickstart) -> dict[str, Any]:
    """The content of the pilot file; its template is the run file of ``no_replay``."""
    return {
        "pilots": {
            "name": "pilots",
            "dir": str(job.out),
            "run": str(job.run_file("no_replay")),
            "shares_general": list(job.scale.pilot_shares),
            "budgets": [
                job.scale.ladder.total_steps(many) * job.scale.batch_tokens for many in job.scale.pilot_multiples
            ],
            "warmup_steps": WARMUP_STEPS,
            "decay_share": DECAY_SHARE,
            "decay": DECAY,
            "min_lr_ratio": MIN_LR_RATIO,
            "evals_per_run": 1,  # the laws are fitted on what was measured after a decay
            "slots": 2,
        }
    }


def check_settings(job: Quickstart, name: str) -> None:
    """Refuse to go on with, or to show as the result of these settings, a run of others.

    Raises:
        ConfigError: a run folder of other settings, or one that follows another recommendation than plan.json.
    """
    if not job.rundir(name).config.exists():
        return
    found, wanted = read_run_config(job.rundir(name).root), run_config(job, name)
    if (found.run.seed, found.data.seq_len, found.train) != (wanted.run.seed, wanted.data.seq_len, wanted.train):
        rule = "holds a quickstart that was made with another --seed or --fast"
        raise ConfigError(Problem("--out", str(job.out), rule, "give another --out, or delete that folder"))
    if (found.plan and found.plan.fingerprint) != (wanted.plan and wanted.plan.fingerprint):
        rule = f"follows another recommendation than {job.plan}"
        raise ConfigError(Problem("plan", str(job.rundir(name).root), rule, "delete that run folder"))


def run_config(job: Quickstart, name: str) -> RunConfig:
    """The run file resolved; for ``planned`` plan.json must be there."""
    raw = run_settings(job, name)
    follow_plan(raw, ())
    return validate(raw)
