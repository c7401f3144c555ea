"""Where DeepSpeed keeps the fp32 weights and the optimizer's state of a rank, for each ZeRO stage and offload.

Whatever the stage, the state is a set of *spans*: ranges of flattened parameters inside flat fp32 tensors that the
optimizer updates. This file is the only one that reads DeepSpeed's attributes for it, through ``_attribute``, which
names the version when one is gone. Copies that DeepSpeed keeps for speed (the weights it computes with, the second
shard of ZeRO++ hpZ) are no state and appear nowhere here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Span:
    """Elements ``start`` ... of a parameter lie in ``flat[where]``, a 1-D view of a flat tensor."""

    name: str
    start: int
    where: slice


@dataclass(frozen=True)
class Flat:
    """One tensor that the optimizer updates: the parameters cut up in it over the ranks, and what of them is here."""

    tensor: torch.Tensor
    members: tuple[str, ...]
    spans: tuple[Span, ...]


class ShardedState(Protocol):
    """The fp32 state of this rank, the same for every stage."""

    def flats(self) -> list[Flat]:
        """Every tensor that the optimizer updates. A tensor swapped to disk is empty outside ``resident``."""
        ...

    def resident(self, flat: Flat, *, writing: bool) -> AbstractContextManager[None]:
        """Inside it the flat tensor and its optimizer state are in memory; ``writing`` keeps what was changed."""
        ...

    def gradients(self) -> list[torch.Tensor]:
        """What this rank updates with, after the whole step's backward passes and before DeepSpeed has scaled it."""
        ...

    def publish(self) -> None:
        """Bring the weights that are computed with in line with the fp32 ones, on all ranks."""
        ...


Names = Mapping[torch.nn.Parameter, str]


def sharded_state(zero_stage: int, optimizer: Any, names: Names) -> ShardedState:
    """``optimizer``: DeepSpeed's wrapper (of the engine); ``names``: the trained parameters."""
    if zero_stage == 0:
        return Replicated(names)
    return Partitioned(optimizer, names) if zero_stage == 3 else Flattened(optimizer, names)


class Replicated:
    """ZeRO 0: every rank holds every parameter, and the optimizer updates them themselves."""

    def __init__(self, names: Names) -> None:
        self._flats = [Flat(p, (name,), (Span(name, 0, slice(0, p.numel())),)) for p, name in names.items()]

    def flats(self) -> list[Flat]:
        return self._flats

    def resident(self, flat: Flat, *, writing: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        return [flat.tensor.grad for flat in self._flats if flat.tensor.grad is not None]

    def publish(self) -> None:
        """The optimizer's weights are the ones computed with."""


class Flattened:
    """ZeRO 1 and 2: each group of parameters is flattened, and each rank updates one contiguous range of it, on its
    device or on the host.
    """

    def __init__(self, optimizer: Any, names: Names) -> None:
        self._optimizer = optimizer
        # ZeRO 1 in bf16 without offload is another class of DeepSpeed's, with its own names for the same things
        other = hasattr(optimizer, "fp32_groups_flat_partition")
        tensors = _attribute(optimizer, "fp32_groups_flat_partition" if other else "single_partition_of_fp32_groups")
        members = _attribute(optimizer, "bf16_groups" if other else "bit16_groups")
        spans: list[list[Span]] = [[] for _ in tensors]
        for parameter, name in names.items():
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # no element of it is in this rank's range
                continue
            held = _attribute(mapping, "hp_fragment_address")
            where = slice(held.start, held.start + held.numel)
            start = _attribute(mapping, "lp_fragment_address").start
            spans[_attribute(mapping, "param_group_index")].append(Span(name, start, where))
        self._flats = _joined(tensors, members, spans, names)

    def flats(self) -> list[Flat]:
        return self._flats

    def resident(self, flat: Flat, *, writing: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        averaged = _attribute(self._optimizer, "averaged_gradients")
        return [gradient for group in averaged.values() for gradient in group]

    def publish(self) -> None:
        _attribute(self._optimizer, "update_lp_params")()


class Partitioned:
    """ZeRO 3: every parameter is cut into equal parts, the last one padded; parts lie behind one another in sub-groups,
    on the device, on the host or (NVMe) in files.
    """

    def __init__(self, optimizer: Any, names: Names) -> None:
        self._optimizer = optimizer
        self._tensors: list[torch.Tensor] = _attribute(optimizer, "fp32_partitioned_groups_flat")
        positions = _attribute(optimizer, "grad_position")
        spans: list[list[Span]] = [[] for _ in self._tensors]
        for parameter, name in names.items():
            sharded: Any = parameter
            group, offset, numel = positions[_attribute(optimizer, "get_param_id")(parameter)]
            start = numel * torch.distributed.get_rank(_attribute(sharded, "ds_process_group"))
            real = max(0, min(numel, _attribute(sharded, "ds_numel") - start))
            if real:
                spans[group].append(Span(name, start, slice(offset, offset + real)))
        self._flats = _joined(self._tensors, _attribute(optimizer, "fp16_groups"), spans, names)
        _forget_with_the_trace(_attribute(_attribute(optimizer, "parameter_offload"), "param_coordinator"))

    def flats(self) -> list[Flat]:
        return self._flats

    def is_swapped(self, flat: Flat) -> bool:
        return bool(_attribute(self._optimizer, "_swappable_optimizer_subgroup")(self._index(flat)))

    @contextmanager
    def resident(self, flat: Flat, *, writing: bool) -> Iterator[None]:
        if not self.is_swapped(flat):
            yield
            return
        index = self._index(flat)
        _attribute(self._optimizer, "_optimizer_states_and_gradient_swap_in")(index)
        try:
            yield
        finally:
            if writing:
                _attribute(self._optimizer, "_optimizer_states_and_gradient_swap_out")(index)
            else:
                _attribute(self._optimizer, "_release_swap_buffers")(index)

    def gradients(self) -> list[torch.Tensor]:
        raise NotImplementedError("ZeRO 3 takes the norm by itself")

    def publish(self) -> None:
        optimizer = self._optimizer
        for index, flat in enumerate(self._flats):
            with self.resident(flat, writing=False):
                _attribute(optimizer, "_reassign_or_swap_out_partitioned_parameters")(index)
        _attribute(optimizer, "invalidate_secondary_tensor")()  # hpZ: the copies within a node are stale
        if persistent := _attribute(optimizer, "persistent_parameters"):
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _index(self, flat: Flat) -> int:
        return next(index for index, tensor in enumerate(self._tensors) if tensor is flat.tensor)


def _forget_with_the_trace(coordinator: Any) -> None:
    """DeepSpeed traces the order of modules, and caches what each lets go of by its place in that order: for ever, also
    when the order turns out to be another. The first one it sees is of an evaluation, where nothing is used again, so
    training would let go of every weight after its forward pass, and gather one after the other in the backward pass.
    """
    name = "_PartitionedParameterCoordinator__params_to_release"
    cells = [cell.cell_contents for cell in _attribute(coordinator, name).__func__.__closure__ or ()]
    invalidate: Callable[[], None] = _attribute(coordinator, "_invalidate_trace")

    def invalidate_and_forget() -> None:
        invalidate()
        for cached in cells:
            _attribute(cached, "cache_clear")()

    coordinator._invalidate_trace = invalidate_and_forget


def _joined(
    tensors: Sequence[torch.Tensor],
    groups: Sequence[Sequence[torch.nn.Parameter]],
    spans: list[list[Span]],
    names: Names,
) -> list[Flat]:
    return [
        Flat(tensor, tuple(names[parameter] for parameter in group), tuple(held))
        for tensor, group, held in zip(tensors, groups, spans, strict=True)
    ]


def _attribute(owner: Any, name: str) -> Any:
    """An attribute of DeepSpeed's own objects. Raises RuntimeError where this version has none."""
    try:
        return getattr(owner, name)
    except AttributeError:
        from importlib.metadata import version

        raise RuntimeError(
            f"DeepSpeed {version('deepspeed')} has no {type(owner).__name__}.{name}, which holds a part of the "
            "training state in version 0.19; install the version that constraints.txt names"
        ) from None
