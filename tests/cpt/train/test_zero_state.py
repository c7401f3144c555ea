"""Another version of DeepSpeed is named, with what it lacks; its cache of what to let go lives no longer than its trace."""

from typing import Any

import pytest
import torch

from cpt.train.zero_state import _forget_with_the_trace, sharded_state


@pytest.mark.parametrize(
    ("stage", "lacks"), [(1, "single_partition_of_fp32_groups"), (3, "fp32_partitioned_groups_flat")]
)
def test_an_attribute_that_is_gone_is_named_with_the_version(stage: int, lacks: str) -> None:
    class Renamed:
        """DeepSpeed's optimizer after a refactoring."""

    with pytest.raises(RuntimeError, match=rf"DeepSpeed \d+\.\d+.* has no Renamed\.{lacks}.*constraints.txt"):
        sharded_state(stage, Renamed(), {})


def test_without_sharding_deepspeed_is_not_asked() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    (flat,) = sharded_state(0, None, {weight: "weight"}).flats()
    assert flat.tensor is weight and flat.members == ("weight",) and flat.spans[0].where == slice(0, 6)


def test_what_training_lets_go_of_is_not_what_an_evaluation_before_it_did() -> None:
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from deepspeed.runtime.zero.partitioned_param_coordinator import ZeRoTraceMode

    def traced(order: list[torch.nn.Module]) -> None:
        own = {"trace_mode": ZeRoTraceMode.COMPLETE, "submodule_order": order, "max_reuse_dist_in_numel": 10**9}
        for name, value in own.items():
            setattr(coordinator, f"_PartitionedParameterCoordinator__{name}", value)

    coordinator: Any = Coordinator.__new__(Coordinator)
    coordinator._PartitionedParameterCoordinator__inflight_param_registry = {}
    coordinator._clear_trace_structures()
    let_go = coordinator._PartitionedParameterCoordinator__params_to_release
    layer: Any = torch.nn.Linear(2, 2, bias=False)
    layer.ds_external_parameters = list
    weight: Any = layer.weight
    weight.ds_id, weight.ds_persist, weight.ds_numel = 7, False, 4
    traced([])  # nothing comes after the layer
    _forget_with_the_trace(coordinator)
    assert let_go(layer, 0) == {7}

    coordinator._invalidate_trace()
    traced([layer])  # its backward pass does

    assert let_go(layer, 0) == set()
