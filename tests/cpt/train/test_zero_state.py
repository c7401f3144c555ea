"""Another version of DeepSpeed is named, with what it lacks."""

import pytest
import torch

from cpt.train.zero_state import sharded_state


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
