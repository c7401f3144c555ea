"""The sections and fields of a run file, with their units, limits and defaults.

Owns what can be stated. A fact lives once: accumulation, steps and the DeepSpeed dictionary are derived elsewhere.
Refuses to know rules that join two fields (``cpt.run_rules``) and how a file is read (``cpt.config``).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cpt.mix_fields import DEFAULT_REPLAY_SHARE as DEFAULT_REPLAY_SHARE  # a part of this module's name, as stages are
from cpt.mix_fields import ConstantMix, Mix, Weight
from cpt.mix_fields import StageSection as StageSection
from cpt.schedule_fields import Count, RewarmCosine, Schedule, Section, Share, Steps

LONGEST_NAME = 128  # of 255 that a folder's name and Slurm's accounts can hold; both add to it
MaxEpochs = Annotated[float, Field(gt=0.0)]


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME)] = Field(
        description="name of the run folder"
    )
    dir: Path = Field(Path("runs"), description="folder that holds run folders")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of data order and fresh weights")


class ModelSection(Section):
    init_from: str | None = Field(
        None, description="pre-trained weights: a Hugging Face folder or hub name, or a checkpoint of an earlier run"
    )
    fresh: dict[str, Any] | str | None = Field(
        None, description="a new model instead: a Hugging Face config mapping, or a YAML file that holds one"
    )
    tokenizer: str | None = Field(
        None, description="tokenizer to export with the model; default: the one in init_from, if any"
    )
    attention: Literal["auto", "sdpa", "flex", "varlen", "flash_attn", "flash_attn_3", "flash_attn_4"] = Field(
        "auto", description="attention back-end"
    )
    kernels: Literal["auto", "torch", "liger"] = Field(
        "auto", description="norms, rotary positions and MLPs: torch's own or fused (auto); Liger's (GPU)"
    )
    rope_theta: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="another base of the rotary positions, for longer rows (ABF: arXiv 2309.16039)"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with a hub model")


class PastMixture(Section):
    """What the run file said of the mixture until it was changed; the plan is built from all of them in turn."""

    until_step: Count = Field(description="steps done when it was changed")
    sources: tuple[str, ...] = Field(min_length=1, description="sources there were, of data.stores")
    share_general: Share | None = Field(None, description="replay.share_general as it was; so with the others")
    weights: dict[str, Weight] = Field(default_factory=dict, description="data.weights")
    max_epochs: MaxEpochs = Field(4.0, description="data.max_epochs")
    max_epochs_of: dict[str, MaxEpochs] = Field(default_factory=dict, description="data.max_epochs_of")
    stages: tuple[StageSection, ...] = Field((), description="data.stages")
    mix: Mix = Field(ConstantMix(), description="data.mix")


class DataSection(Section):
    stores: dict[str, Path] = Field(min_length=1, description="source name -> token store folder")
    seq_len: Count = Field(description="tokens in a packed row")
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="how rows are cut: the stream every seq_len tokens, or only documents longer than a row"
    )
    pack_dir: Path | None = Field(None, description="folder of the best_fit indexes; default: beside each store")
    weights: dict[str, Weight] = Field(
        default_factory=dict, description="relative weight of each source inside its group; default: by tokens"
    )
    max_epochs: MaxEpochs = Field(
        4.0, description="passes over one source before its quota is capped (up to 4 are nearly free: arXiv 2305.16264)"
    )
    max_epochs_of: dict[str, MaxEpochs] = Field(
        default_factory=dict, description="source -> its own cap in place of max_epochs"
    )
    stages: tuple[StageSection, ...] = Field((), description="mixture by stage; replaces replay.share_general")
    mix: Mix = Field(ConstantMix(), description="how the mixture moves over the run's tokens")
    loader_threads: Count = Field(1, description="threads per rank that read rows ahead")
    past: tuple[PastMixture, ...] = Field(
        (), description="mixtures that the run had before this one; written by cpt resume, which may change the mixture"
    )


class ReplaySection(Section):
    share_general: Share | None = Field(
        None,
        description="share of every batch's tokens that replays general data, displacing domain tokens; "
        f"default {DEFAULT_REPLAY_SHARE} when both kinds of store are given",
    )


class PastRates(Section):
    """What the run file said of budget and rate until the run was extended."""

    until_step: Count = Field(description="steps done when it was extended")
    tokens: Count = Field(description="train.tokens as it was")
    peak_lr: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="train.peak_lr as it was")
    schedule: Schedule = Field(description="train.schedule as it was")


class TrainSection(Section):
    tokens: Count = Field(description="token budget of the run, all sources together; whole steps of it are trained")
    global_batch_tokens: Count = Field(description="tokens per step over all ranks; accumulation is derived from it")
    micro_batch_size: Count = Field(description="rows per rank in one forward and backward pass")
    peak_lr: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="highest learning rate")
    schedule: Schedule = Field(RewarmCosine(), description="learning rate over the run")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.1, description="decoupled decay of matrices and embeddings")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="decay of Adam's first and second moment"
    )
    eps: Annotated[float, Field(gt=0.0)] = Field(1e-8, description="added to the root of Adam's second moment")
    max_grad_norm: Annotated[float, Field(gt=0.0)] = Field(1.0, description="gradients are scaled down to this norm")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="compute type; masters and moments stay fp32")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: of the blocks' matrices (arXiv 2502.16982); everything else stays with AdamW"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what the backward pass computes again: nothing, all but matrix products, whole blocks"
    )
    compile: bool = Field(False, description="torch.compile the blocks of the model")
    past: tuple[PastRates, ...] = Field(
        (), description="budgets and rates that the run had before it was extended; written by cpt extend"
    )


class DeepSpeedSection(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="what is sharded: 1 optimizer, 2 + gradients, 3 + weights")
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where masters and moments live instead of the GPU (ZeRO 1-3; nvme: ZeRO 3)"
    )
    nvme_dir: Path | None = Field(None, description="folder on a fast local disk, for offload=nvme")
    hpz_size: Count = Field(1, description="ZeRO++ hpZ: ranks that keep a whole second copy of the weights (ZeRO 3)")
    quantized_communication: bool = Field(
        False, description="ZeRO++ qwZ and qgZ: weights and gradients travel in 8 and 4 bits (ZeRO 3, GPU)"
    )
    sequence_parallel: Count = Field(1, description="ranks that share one row (Ulysses); divides the attention heads")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="keys merged over the generated DeepSpeed dictionary, unchecked"
    )


class CheckpointSection(Section):
    every_steps: Count | None = Field(None, description="default: only after the last step")
    keep_last: Count = Field(2, description="full checkpoints kept; the newest is never deleted")
    keep_weights_every: Count | None = Field(
        None, description="of checkpoints whose step this divides, weights are kept for good; default: of none"
    )
    keep_best: str | None = Field(
        None, description="also keep the checkpoint of the lowest held-out loss on this source or group; default: none"
    )
    upload_to: str | None = Field(
        None, description="URL (s3://..., gs://..., file://...) that complete checkpoints are copied to"
    )


class GuardSection(Section):
    max_rollbacks: int = Field(
        3, ge=0, description="times a bad step sends the run back to its last checkpoint; 0: stop at the first"
    )
    spike_sigma: Annotated[float, Field(gt=0.0)] | None = Field(
        8.0, description="robust standard deviations above the median that make a loss or norm a spike; null: never"
    )
    hang_seconds: Annotated[float, Field(gt=0.0)] = Field(
        1800.0, description="a rank without a sign of life for so long ends the job"
    )
    stop_after_seconds: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="save and stop after this wall-clock time, as a scheduler's limit asks; default: never"
    )


class EvalSection(Section):
    every_steps: Count | None = Field(None, description="default: step 0 and the last step only")
    at_steps: tuple[Steps, ...] = Field((), description="further steps to evaluate at")
    tokens_per_source: Count = Field(262_144, description="held-out tokens evaluated of each source, at most")
    suite: Path | None = Field(None, description="YAML of benchmarks to run on the model in training; default: none")
    suite_steps: tuple[Steps, ...] | Literal["geometric"] = Field(
        "geometric", description="steps at which it runs; geometric: doubling over the first 5%, then every tenth"
    )


class LogSection(Section):
    every_steps: Count = Field(10, description="steps of one record in metrics.jsonl")
    wandb: Literal["disabled", "offline", "online"] = Field(
        "offline", description="Weights & Biases; online needs a login"
    )


class PlanSection(Section):
    """The recommendation that drives the run; a bare path stands for ``path``."""

    path: Path = Field(description="plan.json of cpt plan recommend; its stages replace the run file's mixture")
    fingerprint: str | None = Field(None, description="of the recommendation; filled in when the run file is loaded")
    replaced: dict[str, Any] = Field(
        default_factory=dict, description="what the run file itself said; filled in when it is loaded"
    )


def _path_alone(plan: object) -> object:
    return {"path": plan} if isinstance(plan, str | Path) else plan


class RunConfig(Section):
    """Everything a run needs; frozen."""

    run: RunSection
    model: ModelSection
    data: DataSection
    plan: Annotated[
        PlanSection | None, BeforeValidator(_path_alone, json_schema_input_type=str | PlanSection | None)
    ] = Field(None, description="recommendation to follow: plan.json of cpt plan recommend")
    replay: ReplaySection = ReplaySection()
    train: TrainSection
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    @property
    def global_batch_rows(self) -> int:
        return self.train.global_batch_tokens // self.data.seq_len
