"""The only file that imports DeepSpeed: start the process group, build the engine, take one optimizer step, expose its
state.

Whatever the ZeRO stage, the training state of a rank is a set of *fragments*: contiguous ranges of flattened
parameters with their fp32 master weights and the optimizer's state. A checkpoint is the union of all ranks' fragments
and so knows neither stage, offload nor world size. Where fragments live is ``cpt.train.zero_state``'s, what DeepSpeed
is told ``cpt.train.deepspeed_config``'s.

Precision: ``fp32``, or ``bf16`` compute with fp32 masters, moments, gradient accumulation and reductions (autocast
over fp32 weights under ZeRO 0, bf16 weights with sharded masters under ZeRO 1-3).
"""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from cpt.checkpoint.portable import Fragment
from cpt.train import gloo
from cpt.train.abandoned_build import clear_abandoned_build
from cpt.train.collectives import count_collectives
from cpt.train.deepspeed_config import EngineSpec, deepspeed_config
from cpt.train.guard import check_finite
from cpt.train.joining import start_group
from cpt.train.muon import Cut, Muon
from cpt.train.one_by_one import OneByOne
from cpt.train.optim import full_shape
from cpt.train.phases import Phases
from cpt.train.zero_state import Flat, Partitioned, sharded_state


@dataclass(frozen=True)
class Topology:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def start_process_group(*, hang_seconds: float = 1800.0, asked_to_stop: Callable[[], bool] = lambda: False) -> Topology:
    """Join the job described by the launcher's environment, or start a job of one process.

    gloo between CPUs, nccl between GPUs. Ranks that do not come are named (``cpt.train.joining``); a collective call
    that one rank has not joined ends with an error on the others, long after ``hang_seconds``.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said, so that it does not warn about having found nothing else
    import deepspeed

    _quieten()
    launched = "RANK" in os.environ
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:  # otherwise a C++ kernel that gloo does not need is compiled at every first start: half a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.nvtx.enable_nvtx = False  # marks for a GPU's profiler, thousands of calls in a step of ZeRO 3
    backend, device = ("nccl", torch.device("cuda", local_rank)) if on_gpu else ("gloo", torch.device("cpu"))
    if not dist.is_initialized():
        if launched:
            start_group(backend, device, hang_seconds=hang_seconds, asked_to_stop=asked_to_stop)
        else:  # needs no port, and the next run of this process finds the environment as this one did
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        if not on_gpu:  # the slots in which DeepSpeed keeps what it found in torch
            transport = deepspeed.comm.comm.cdb
            transport.all_gather_function = gloo.all_gather_into_tensor
            transport.reduce_scatter_function = gloo.reduce_scatter_tensor
    return Topology(dist.get_rank(), dist.get_world_size(), device)


def _quieten() -> None:
    """DeepSpeed's dozens of lines per rank, and warnings about calls that are not ours."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module="deepspeed")


def stop_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    if "RANK" not in os.environ:  # no launcher: the one that is there is ours, and looks like a job to what comes after
        os.environ.pop("LOCAL_RANK", None)
    from deepspeed.utils import groups

    groups._WORLD_GROUP = None  # it keeps the destroyed group, and a second run in this process would be handed it


class Engine:
    """A DeepSpeed engine reduced to what a training loop and a checkpoint need."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, spec: EngineSpec, topology: Topology
    ) -> None:
        import deepspeed

        self.topology = topology
        self.spec = spec
        self.before_update: Callable[[], None] = lambda: None  # called just before the weights move
        self._pending = False  # gradients wait for a step
        self.optimizer_steps = 0  # updates that the moments have seen; Adam's bias correction depends on it
        self._optimizer = optimizer
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._kinds = {
            self._names[parameter]: tuple(group["state_kinds"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        shapes = self.parameter_shapes()
        config = deepspeed_config(
            spec,
            world_size=topology.world_size,
            on_gpu=topology.on_gpu,
            num_parameters=sum(prod(shape) for shape in shapes.values()),
        )
        with redirect_stdout(StringIO()):  # some classes print a dozen lines about the memory of the host
            self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._deepspeed.train()  # a model that was loaded comes for evaluation, where it recomputes and drops nothing
        if topology.world_size == 1 and self.is_replicated:  # it would copy every gradient to and fro
            self._deepspeed.enable_backward_allreduce = False
        self._state = sharded_state(spec.zero_stage, self._deepspeed.optimizer, self._names)
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
        return {name: full_shape(parameter) for parameter, name in self._names.items()}

    def count_communication(self, phases: Phases) -> None:
        """From now on what DeepSpeed waits for in collective calls counts as communication."""
        from deepspeed import comm

        count_collectives(comm.comm.cdb, phases)

    def expect(self, micro_batches: int) -> None:
        """The next step comes in so many backward passes: a stage with longer rows has another number of them."""
        self._deepspeed.micro_steps = 0  # DeepSpeed takes the step at its multiples of the number
        self._deepspeed._config.gradient_accumulation_steps = micro_batches

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's part of the global loss.

        ``loss`` is (sum over this micro-batch's counted tokens) / (counted tokens of the *global* batch). DeepSpeed
        averages gradients over ranks, so the factor world_size turns that average back into the sum that the
        definition of the loss asks for.
        """
        self._pending = True
        self._deepspeed.backward(loss * self.topology.world_size, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # only counts the micro-step

    def step(self, lr: float, *, judge: Callable[[float], None] | None = None) -> float:
        """Clip, update the weights at rate ``lr``, clear gradients; returns the gradient norm before clipping.

        ``judge`` is shown the norm and raises where it must not be: before the weights move where
        ``spec.clips_first``, else after, for DeepSpeed does not tell earlier. By default it refuses a norm that is not
        finite.

        Raises:
            NonFiniteError: the norm is not finite. The weights have not moved: the update is not tried, or DeepSpeed
                skips it.
        """
        judge = judge or self._check_norm
        self._set(lr=lr, grad_scale=None)
        norm = 0.0
        if self.spec.clips_first:
            norm = self._gradient_norm()
            judge(norm)
            self._set(lr=lr, grad_scale=max(1.0, (norm + 1e-6) / self.spec.max_grad_norm))
        self.before_update()
        self._deepspeed.step()
        self._pending = False
        if not self.spec.clips_first:
            norm = float(self._deepspeed.get_global_grad_norm())
            judge(norm)
        self.optimizer_steps += 1
        return norm

    def _set(self, *, lr: float, grad_scale: float | None) -> None:
        """What the next update does: its rate, and what the fused kernels divide gradients by as they read them, which
        saves a pass over all of them.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = None if grad_scale is None else torch.tensor(grad_scale, device=self.topology.device)
        self._optimizer.grad_scale = scale  # type: ignore[attr-defined] # torch's name, of its gradient scaler

    def _gradient_norm(self) -> float:
        """Norm of the whole gradient, the same on all ranks."""
        gradients = self._state.gradients()
        total = torch.stack(torch._foreach_norm(gradients)).square().sum() if gradients else torch.zeros(())
        if not self.is_replicated:
            total = total.to(self.topology.device)
            dist.all_reduce(total)
        return float(total.sqrt())

    def rehearse(self, loss: Callable[[], torch.Tensor]) -> float:
        """Take a step on one micro-batch at rate 0 and return its gradient norm. ``loss()`` is its mean loss, computed
        twice where gradients accumulate, because from the second micro-step on the first one's gradients take memory.

        No weight moves, but the moments do: ``restore`` must follow.
        """
        times = min(2, self.spec.grad_accum_steps)
        for turn in range(times):
            if turn == times - 1:
                self._deepspeed.set_gradient_accumulation_boundary(True)
            # every rank has its own loss here, and the norm is to be that of their mean
            self.backward(loss() / (times * self.topology.world_size))
        norm = self.step(0.0)
        self._deepspeed.set_gradient_accumulation_boundary(None)  # DeepSpeed counts for itself again, from 0
        self._deepspeed.micro_steps = 0
        return norm

    def _check_norm(self, norm: float) -> None:
        check_finite([("the gradient", norm)], step=self.optimizer_steps + 1)

    def fragments(self) -> Iterator[Fragment]:
        """Every fragment that this rank holds; writing into the views changes the live state.

        State that is swapped to disk is there only until the next fragment is asked for, and what is written into it
        is lost; ``restore`` is the way to change it.
        """
        for flat in self._state.flats():
            with self._state.resident(flat, writing=False):
                yield from self._fragments_of(flat)

    def owned_fragments(self) -> Iterator[Fragment]:
        """Fragments that over all ranks hold every element once: what this rank writes to a checkpoint. Those of
        state that is swapped to disk are copies, which stay valid.
        """
        parts, rank = self.topology.world_size, self.topology.rank
        swapped = isinstance(self._state, Partitioned) and self.spec.offload == "nvme"
        for fragment in self.fragments():
            if not self.is_replicated:
                state = {kind: tensor.clone() for kind, tensor in fragment.state.items()} if swapped else fragment.state
                yield Fragment(fragment.name, fragment.start, state)
                continue
            begin, end = fragment.numel * rank // parts, fragment.numel * (rank + 1) // parts
            if end > begin:
                state = {kind: tensor[begin:end] for kind, tensor in fragment.state.items()}
                yield Fragment(fragment.name, fragment.start + begin, state)

    def restore(self, fill: Callable[[Fragment], None], *, optimizer_steps: int) -> None:
        """Let ``fill`` overwrite every fragment, then bring the compute weights in line with the masters on all
        ranks. Gradients of a step whose micro-batches have all been seen, but that was refused, are dropped.
        """
        self.before_update()
        if self._pending:  # DeepSpeed forgets them by taking the step, and all that this moves is overwritten below
            self._deepspeed.step()
            self._pending = False
        for flat in self._state.flats():
            with self._state.resident(flat, writing=True):
                for fragment in self._fragments_of(flat):
                    fill(fragment)
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(optimizer_steps)
        self.optimizer_steps = optimizer_steps
        self._state.publish()

    def _fragments_of(self, flat: Flat) -> Iterator[Fragment]:
        for span in flat.spans:
            state = self._optimizer.state[flat.tensor]
            tensors = {"param": flat.tensor.data, **{kind: state[kind] for kind in self._kinds[span.name]}}
            yield Fragment(span.name, span.start, {kind: t.view(-1)[span.where] for kind, t in tensors.items()})

    def _make_optimizer_state(self) -> None:
        """Create zero moments now, for all stages alike: DeepSpeed makes them at the first step, or by a step with
        zero gradients.
        """
        for flat in self._state.flats():
            kinds = self._kinds[flat.members[0]]
            with self._state.resident(flat, writing=True):
                state = {kind: torch.zeros_like(flat.tensor.data) for kind in kinds}
                if "exp_avg" in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=flat.tensor.device)
                self._optimizer.state[flat.tensor] = state
            if isinstance(self._optimizer, Muon) and "momentum_buffer" in kinds:
                self._optimizer.share_out(
                    flat.tensor, self._cut(flat), device=self.topology.device, replicated=self.is_replicated
                )

    def _cut(self, flat: Flat) -> Cut:
        shapes = self.parameter_shapes()
        held = {span.name: (span.start, span.where.start, span.where.stop - span.where.start) for span in flat.spans}
        return Cut({name: (shapes[name][0], shapes[name][1]) for name in flat.members}, held)


def check_machine(spec: EngineSpec, topology: Topology) -> None:
    """Raises RuntimeError where this machine lacks what the spec needs, with what to install or to set instead."""
    if spec.quantized_communication and not topology.on_gpu:
        raise RuntimeError("deepspeed.quantized_communication packs weights with GPU kernels, and there is no GPU here")
    if spec.offload != "nvme":
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if not AsyncIOBuilder().is_compatible(verbose=False):
        missing.append("libaio with its headers (Debian: libaio-dev; Red Hat: libaio-devel)")
    if missing:
        raise RuntimeError(
            "deepspeed.offload=nvme writes with DeepSpeed's async_io extension, which is compiled at the first start; "
            f"this machine lacks {', '.join(missing)}. Install it, or use deepspeed.offload=cpu"
        )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        from torch.utils.cpp_extension import _get_build_directory

        said = clear_abandoned_build(Path(_get_build_directory(AsyncIOBuilder().name, verbose=False)))
        if said:
            print(f"WARNING: {said}", file=sys.stderr, flush=True)


def shard_parameters(model: torch.nn.Module, spec: EngineSpec, topology: Topology) -> None:
    """ZeRO 3: cut every parameter over the ranks, one after the other, so that no rank ever holds them all here.

    Rank 0's values are the ones used. Elsewhere parameters may be on the meta device (``empty_parameters``): shapes
    without memory. Buffers move to the device of the rank.
    """
    import deepspeed

    config = deepspeed_config(spec, world_size=topology.world_size, on_gpu=topology.on_gpu)
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    deepspeed.zero.Init(module=OneByOne(model, topology.device, dtype), config_dict_or_path=config, dtype=dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(topology.device)
