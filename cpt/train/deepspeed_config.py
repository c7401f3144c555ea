"""The dictionary that DeepSpeed is configured with, derived from a few facts about the run.

Owns every key that we set and why. A user states none of them twice: sizes of the batch, precision, clipping and the
sharding all come from the run file, and ``deepspeed.extra`` is merged over the result. Needs no torch: it is
arithmetic.

Sizes of buckets are elements, as DeepSpeed counts them. A gradient bucket travels when it is full, so small ones let
the network work while the backward pass goes on, and big ones cost fewer calls. On a GPU there are about 24 of them
in a model, never under 8 million elements (16 MB of bf16, where links are near their peak speed) and never over 256
million (two bucket buffers are kept). Between CPUs nothing overlaps, gradients stay where autograd made them, and few
big calls are best.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKETS_PER_MODEL = 24
SMALLEST_BUCKET, LARGEST_BUCKET = 8_000_000, 256_000_000
CPU_BUCKET = 16_000_000  # 64 MB of fp32
NVME_SUB_GROUP = 100_000_000  # elements swapped at a time: 1.6 GB of pinned host memory for weights, moments, gradients


@dataclass(frozen=True)
class EngineSpec:
    """What the DeepSpeed dictionary is generated from."""

    zero_stage: int
    precision: str  # fp32 | bf16
    micro_batch_size: int
    grad_accum_steps: int
    max_grad_norm: float
    extra: Mapping[str, Any] = field(default_factory=dict)
    offload: str = "none"  # none | cpu | nvme
    nvme_dir: Path | None = None
    hpz_size: int = 1
    quantized_communication: bool = False

    @property
    def clips_first(self) -> bool:
        """Our engine takes the norm before the weights move, and the optimizer divides by it on the way. DeepSpeed does
        both for itself under ZeRO 3, where gradients are offloaded, and in the class it has for ZeRO 1 in bf16.
        """
        own_class = self.zero_stage == 1 and self.precision == "bf16"
        return self.zero_stage < 3 and self.offload == "none" and not own_class


def deepspeed_config(
    spec: EngineSpec, *, world_size: int, on_gpu: bool = False, num_parameters: int = 0
) -> dict[str, Any]:
    """The DeepSpeed dictionary, derived: nothing in it is stated twice by the user; ``extra`` is merged over it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": spec.micro_batch_size,
        "gradient_accumulation_steps": spec.grad_accum_steps,
        "train_batch_size": spec.micro_batch_size * spec.grad_accum_steps * world_size,
        "gradient_clipping": 0.0 if spec.clips_first else spec.max_grad_norm,
        "zero_optimization": _zero(spec, on_gpu=on_gpu, num_parameters=num_parameters),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    if spec.precision == "bf16" and spec.zero_stage == 0:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif spec.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(config, spec.extra)


def _zero(spec: EngineSpec, *, on_gpu: bool, num_parameters: int) -> dict[str, Any]:
    if spec.zero_stage == 0:
        return {"stage": 0}
    bucket = max(SMALLEST_BUCKET, min(LARGEST_BUCKET, num_parameters // BUCKETS_PER_MODEL)) if on_gpu else CPU_BUCKET
    zero: dict[str, Any] = {"stage": spec.zero_stage, "reduce_bucket_size": bucket, "overlap_comm": on_gpu}
    if spec.zero_stage == 3:
        zero |= _stage_3(spec, bucket, on_gpu=on_gpu)
    else:
        # The rank that owns a slice needs the sum, the others do not; between CPUs one plain all-reduce in place is
        # quicker than the copies that sorting the slices costs.
        zero |= {"contiguous_gradients": on_gpu, "reduce_scatter": on_gpu}
        zero["compute_grad_norm"] = not spec.clips_first
    if spec.offload != "none":
        zero["offload_optimizer"] = _offload(spec, on_gpu=on_gpu)
    return zero


def _stage_3(spec: EngineSpec, bucket: int, *, on_gpu: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"contiguous_gradients": True, "stage3_prefetch_bucket_size": bucket}
    zero["memory_efficient_linear"] = on_gpu  # frees gathered weights before the backward pass, by slower Python
    if spec.hpz_size > 1:
        zero["zero_hpz_partition_size"] = spec.hpz_size
    if spec.quantized_communication:
        zero |= {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    if spec.offload == "nvme":
        zero["sub_group_size"] = NVME_SUB_GROUP
    return zero


def _offload(spec: EngineSpec, *, on_gpu: bool) -> dict[str, Any]:
    if spec.offload == "cpu":
        return {"device": "cpu", "pin_memory": on_gpu}
    return {"device": "nvme", "nvme_path": str(spec.nvme_dir), "pin_memory": on_gpu}


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged
