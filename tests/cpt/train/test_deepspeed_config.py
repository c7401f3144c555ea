"""The derived DeepSpeed dictionary, for clusters of three sizes and every place that state can be kept in."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.train.deepspeed_config import LARGEST_BUCKET, SMALLEST_BUCKET, EngineSpec, deepspeed_config

ALWAYS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "communication_data_type": "fp32",
    "steps_per_print": None,
}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def spec(stage: int, precision: str = "fp32", micro: int = 1, accumulate: int = 1, **fields: Any) -> EngineSpec:
    return EngineSpec(stage, precision, micro, accumulate, max_grad_norm=1.0, **fields)


def zero(given: EngineSpec, **where: Any) -> dict[str, Any]:
    found: dict[str, Any] = deepspeed_config(given, world_size=8, **where)["zero_optimization"]
    return found


def test_one_process() -> None:
    assert deepspeed_config(spec(0, micro=4), world_size=1) == ALWAYS | {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 4,
        "gradient_clipping": 0.0,  # by our engine
        "zero_optimization": {"stage": 0},
    }


def test_one_host_of_8_gpus() -> None:
    given = spec(2, "bf16", 2, 4)
    assert deepspeed_config(given, world_size=8, on_gpu=True, num_parameters=2_400_000_000) == ALWAYS | BF16 | {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 64,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 100_000_000,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "compute_grad_norm": False,
        },
    }


def test_64_hosts_of_8_gpus_with_keys_of_the_users_own() -> None:
    extra = {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    given = spec(3, "bf16", 1, 2, extra=extra, hpz_size=8, quantized_communication=True)
    assert deepspeed_config(given, world_size=512, on_gpu=True, num_parameters=70_000_000_000) == ALWAYS | BF16 | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 1024,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": LARGEST_BUCKET,
            "stage3_prefetch_bucket_size": LARGEST_BUCKET,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "memory_efficient_linear": True,
            "zero_hpz_partition_size": 8,
            "zero_quantized_weights": True,
            "zero_quantized_gradients": True,
        },
        "wall_clock_breakdown": True,
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_and_moments_on_the_host_are_clipped_by_deepspeed(stage: int) -> None:
    config = deepspeed_config(spec(stage, offload="cpu"), world_size=2, on_gpu=True)
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert config["zero_optimization"].get("compute_grad_norm", True)


def test_state_in_files_is_swapped_in_groups_of_bounded_size() -> None:
    found = zero(spec(3, offload="nvme", nvme_dir=Path("/fast")))
    assert found["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast", "pin_memory": False}
    assert found["sub_group_size"] == 100_000_000


def test_bf16_without_sharding_keeps_fp32_weights_under_autocast() -> None:
    config = deepspeed_config(spec(0, "bf16"), world_size=1)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and "bf16" not in config


def test_deepspeed_clips_where_it_has_a_class_of_its_own() -> None:
    assert not spec(1, "bf16").clips_first and spec(1, "fp32").clips_first and spec(2, "bf16").clips_first


def test_extra_keys_are_merged_deeply_and_win() -> None:
    given = spec(1, extra={"zero_optimization": {"reduce_bucket_size": 5}, "gradient_clipping": 0.5})
    config = deepspeed_config(given, world_size=1)
    assert config["zero_optimization"]["reduce_bucket_size"] == 5 and config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 1
    assert given.extra["zero_optimization"] == {"reduce_bucket_size": 5}  # the user's own mapping is left alone


@given(st.integers(0, 10**13), st.sampled_from([1, 2, 3]))
def test_buckets_stay_between_their_limits_and_a_gpu_sends_while_it_computes(parameters: int, stage: int) -> None:
    found = zero(spec(stage), on_gpu=True, num_parameters=parameters)
    assert SMALLEST_BUCKET <= found["reduce_bucket_size"] <= LARGEST_BUCKET and found["overlap_comm"]
    assert not zero(spec(stage), num_parameters=parameters)["overlap_comm"]  # nothing overlaps between CPUs
