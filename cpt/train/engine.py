"""The only file that knows DeepSpeed: start the process group, build the engine, take one optimizer step, expose its
state.

Whatever the ZeRO stage, the training state of a rank is a set of *fragments*: contiguous ranges of flattened
parameters with their fp32 master weights and Adam moments. A checkpoint is the union of all ranks' fragments and so
knows neither stage nor world size.

Precision: ``fp32``, or ``bf16`` compute with fp32 masters, moments, gradient accumulation and reductions (autocast
over fp32 weights under ZeRO 0, bf16 weights with sharded masters under ZeRO 1-3).
"""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cpt.checkpoint.portable import STATE_KINDS, Fragment
from cpt.train.guard import check_finite


@dataclass(frozen=True)
class Topology:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class EngineSpec:
    """What the DeepSpeed dictionary is generated from."""

    zero_stage: int
    precision: str  # fp32 | bf16
    micro_batch_size: int
    grad_accum_steps: int
    max_grad_norm: float
    extra: Mapping[str, Any]


def start_process_group() -> Topology:
    """Join the job described by the launcher's environment, or start a job of one process.

    gloo between CPUs, nccl between GPUs.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said, so that it does not warn about having found nothing else
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # otherwise dozens of lines per rank
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:  # otherwise a C++ kernel that gloo does not need is compiled at every first start: half a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Topology(dist.get_rank(), dist.get_world_size(), device)


def stop_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    from deepspeed.utils import groups

    groups._WORLD_GROUP = None  # it keeps the destroyed group, and a second run in this process would be handed it


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed_config(spec: EngineSpec, *, world_size: int) -> dict[str, Any]:
    """The DeepSpeed dictionary, derived: nothing in it is stated twice by the user; ``extra`` is merged over it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": spec.micro_batch_size,
        "gradient_accumulation_steps": spec.grad_accum_steps,
        "train_batch_size": spec.micro_batch_size * spec.grad_accum_steps * world_size,
        # ZeRO 0 clips here, where the norm can be seen before the weights move; sharded gradients are clipped by
        # DeepSpeed.
        "gradient_clipping": spec.max_grad_norm if spec.zero_stage else 0.0,
        "zero_optimization": {"stage": spec.zero_stage},
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


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


class Engine:
    """A DeepSpeed engine reduced to what a training loop and a checkpoint need."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, spec: EngineSpec, topology: Topology
    ) -> None:
        import deepspeed

        self.topology = topology
        self.spec = spec
        config = deepspeed_config(spec, world_size=topology.world_size)
        self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._make_optimizer_state()

    @property
    def model(self) -> torch.nn.Module:
        """Call this for a forward pass: its hooks gather sharded weights."""
        engine: torch.nn.Module = self._deepspeed
        return engine

    @property
    def is_replicated(self) -> bool:
        """Every rank holds the whole state (ZeRO 0), rather than its own part."""
        return self.spec.zero_stage == 0

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trained parameter, by name, also where this rank holds only a part."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for p, name in self._names.items()}

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's part of the global loss.

        ``loss`` is (sum over this micro-batch's counted tokens) / (counted tokens of the *global* batch). DeepSpeed
        averages gradients over ranks, so the factor world_size turns that average back into the sum that the
        definition of the loss asks for.
        """
        self._deepspeed.backward(loss * self.topology.world_size, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # only counts the micro-step

    def step(self, lr: float) -> float:
        """Clip, update the weights at rate ``lr``, clear gradients; returns the gradient norm before clipping.

        Raises:
            NonFiniteError: the norm is not finite. The weights have not moved: under ZeRO 0 the update is not tried,
                under ZeRO 1-3 DeepSpeed skips it.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr
        norm: Any = None
        if self.is_replicated:
            norm = float(torch.nn.utils.clip_grad_norm_(list(self._names), self.spec.max_grad_norm))
            check_finite([("the gradient", norm)], step=self.optimizer_steps + 1)
        self._deepspeed.step()
        if not self.is_replicated:
            norm = float(self._deepspeed.get_global_grad_norm())
            check_finite([("the gradient", norm)], step=self.optimizer_steps + 1)
        return float(norm)

    def fragments(self) -> Iterator[Fragment]:
        """Every fragment that this rank holds; writing into the views changes the live state."""
        for name, start, flat, span in self._flat_spans():
            if span.stop > span.start:
                state = {"param": flat.data, **{kind: self._adamw.state[flat][kind] for kind in STATE_KINDS[1:]}}
                yield Fragment(name, start, {kind: tensor.view(-1)[span] for kind, tensor in state.items()})

    def owned_fragments(self) -> Iterator[Fragment]:
        """Fragments that over all ranks hold every element once: what this rank writes to a checkpoint."""
        parts, rank = self.topology.world_size, self.topology.rank
        for fragment in self.fragments():
            if not self.is_replicated:
                yield fragment
                continue
            begin, end = fragment.numel * rank // parts, fragment.numel * (rank + 1) // parts
            if end > begin:
                state = {kind: tensor[begin:end] for kind, tensor in fragment.state.items()}
                yield Fragment(fragment.name, fragment.start + begin, state)

    @property
    def optimizer_steps(self) -> int:
        """Updates that the Adam moments have seen; the bias correction depends on it."""
        return int(next(iter(self._adamw.state.values()))["step"])

    def restore(self, fill: Callable[[Fragment], None], *, optimizer_steps: int) -> None:
        """Let ``fill`` overwrite every fragment, then bring the compute weights in line with the masters on all
        ranks.
        """
        for fragment in self.fragments():
            fill(fragment)
        for state in self._adamw.state.values():
            state["step"].fill_(optimizer_steps)
        self._publish_masters()

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._deepspeed.basic_optimizer
        return optimizer

    def _make_optimizer_state(self) -> None:
        """Create zero moments now, for all stages alike: DeepSpeed makes them at the first step, or by a step with
        zero gradients.
        """
        flats = {id(flat): flat for _, _, flat, _ in self._flat_spans()}
        for flat in flats.values():
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            moments = {kind: torch.zeros_like(flat.data) for kind in STATE_KINDS[1:]}
            self._adamw.state[flat] = {"step": step, **moments}

    def _flat_spans(self) -> Iterator[tuple[str, int, torch.Tensor, slice]]:
        """(parameter, first element held, flat fp32 master it lives in, where in that master)."""
        if self.is_replicated:
            return self._replicated()
        return self._sharded_3() if self.spec.zero_stage == 3 else self._sharded_12()

    def _replicated(self) -> Iterator[tuple[str, int, torch.Tensor, slice]]:
        for parameter, name in self._names.items():
            yield name, 0, parameter, slice(0, parameter.numel())

    def _sharded_12(self) -> Iterator[tuple[str, int, torch.Tensor, slice]]:
        """ZeRO 1 and 2 flatten each group of parameters and give each rank one contiguous range of it."""
        optimizer = self._deepspeed.optimizer
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        for parameter, name in self._names.items():
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                held = mapping.hp_fragment_address
                span = slice(held.start, held.start + held.numel)
                yield name, mapping.lp_fragment_address.start, flats[mapping.param_group_index], span

    def _sharded_3(self) -> Iterator[tuple[str, int, torch.Tensor, slice]]:
        """ZeRO 3 cuts every parameter into equal parts, the last one padded."""
        optimizer = self._deepspeed.optimizer
        for parameter, name in self._names.items():
            sharded: Any = parameter
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = numel * self.topology.rank
            real = max(0, min(numel, sharded.ds_numel - start))
            yield name, start, optimizer.fp32_partitioned_groups_flat[group], slice(offset, offset + real)

    def _publish_masters(self) -> None:
        optimizer = self._deepspeed.optimizer
        if self.spec.zero_stage in (1, 2):
            optimizer.update_lp_params()
        elif self.spec.zero_stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
