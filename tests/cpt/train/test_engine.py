"""The engine against its promises, with real DeepSpeed: fragments cover the state, and any ZeRO stage continues any other."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cpt.checkpoint.portable import Fragment
from cpt.train.deepspeed_config import EngineSpec
from cpt.train.engine import (
    Engine,
    Topology,
    check_machine,
    start_process_group,
    stop_process_group,
)
from cpt.train.guard import NonFiniteError
from cpt.train.optim import OptimizerSpec, build_optimizer

ROOT = Path(__file__).resolve().parents[3]
STAGES = (0, 1, 2, 3)
# under ZeRO 3 small parameters are kept whole on every rank; here all are small, so that has to be told off too
EVERY_ONE_CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
PLACES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3 all cut": {"stage": 3, "extra": EVERY_ONE_CUT},
    "1 on the host": {"stage": 1, "offload": "cpu"},
    "2 on the host": {"stage": 2, "offload": "cpu"},
    "3 on the host": {"stage": 3, "offload": "cpu"},
}
HANDOVERS = [(saved, loaded) for saved in PLACES for loaded in PLACES if saved != loaded]
State = list[tuple[str, int, dict[str, torch.Tensor]]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_process_group()
    stop_process_group()


def tiny_model(seed: int = 0) -> torch.nn.Module:
    """Tied embeddings, uneven sizes, and gains of two elements, fewer than there are ranks."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 41, "num_hidden_layers": 1, "head_dim": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True))


def build(
    topology: Topology, stage: int, precision: str = "fp32", *, seed: int = 0, optimizer: str = "adamw", **fields: Any
) -> Engine:
    """``fields``: of the EngineSpec, and ``accumulate``."""
    model, accumulate = tiny_model(seed), fields.pop("accumulate", 1)
    micro = 4 // (accumulate * topology.world_size)
    spec = EngineSpec(stage, precision, micro, accumulate, max_grad_norm=1.0, **fields)
    how = OptimizerSpec(optimizer, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    return Engine(model, build_optimizer(model, how), spec=spec, topology=topology)


def rows(step: int) -> torch.Tensor:
    return torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(step))


def train_step(engine: Engine, step: int, *, micro_batches: int = 1) -> float:
    """One update on this rank's part of the step's rows; returns the rank's part of the global loss."""
    total, topology = 0.0, engine.topology
    for ids in rows(step).chunk(topology.world_size)[topology.rank].chunk(micro_batches):
        logits = engine.model(input_ids=ids).logits.float()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / (4 * 11)
        engine.backward(loss)
        total += loss.item()
    engine.step(lr=1e-2)
    return total


def losses(engine: Engine, steps: Sequence[int]) -> list[float]:
    return [train_step(engine, step) for step in steps]


def copied(engine: Engine) -> State:
    return [(f.name, f.start, {k: t.clone() for k, t in f.state.items()}) for f in engine.owned_fragments()]


def whole(state: State, shapes: dict[str, tuple[int, ...]]) -> dict[tuple[str, str], torch.Tensor]:
    """Every parameter's flat state, assembled from fragments; NaN where nothing was given."""
    flat = {
        (kind, name): torch.full((torch.Size(shapes[name]).numel(),), torch.nan)
        for name, _, tensors in state
        for kind in tensors
    }
    for name, start, tensors in state:
        for kind, tensor in tensors.items():
            flat[kind, name][start : start + tensor.numel()] = tensor.float()
    return flat


def restore(engine: Engine, state: State, shapes: dict[str, tuple[int, ...]], steps: int) -> None:
    flat = whole(state, shapes)

    def fill(fragment: Fragment) -> None:
        for kind, target in fragment.state.items():
            target.copy_(flat[kind, fragment.name][fragment.start : fragment.start + fragment.numel])

    engine.restore(fill, optimizer_steps=steps)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("place", PLACES)
def test_fragments_hold_every_element_once_and_restoring_them_repeats_the_run_bit_for_bit(
    topology: Topology, place: str, optimizer: str, precision: str
) -> None:
    how: dict[str, Any] = {**PLACES[place], "precision": precision, "optimizer": optimizer}
    engine = build(topology, **how)
    shapes = {name: tuple(p.shape) for name, p in tiny_model().named_parameters()}
    assert engine.parameter_shapes() == shapes
    losses(engine, range(2))
    state, steps = copied(engine), engine.optimizer_steps
    assert steps == 2
    assert sum(tensors["param"].numel() for _, _, tensors in state) == sum(
        map(lambda s: torch.Size(s).numel(), shapes.values())
    )
    assert not any(tensor.isnan().any() for tensor in whole(state, shapes).values())
    assert all(tensor.dtype == torch.float32 for _, _, tensors in state for tensor in tensors.values())
    expected = losses(engine, range(2, 5))
    again = build(topology, **how, seed=1)  # other weights: all must come from the fragments
    restore(again, state, shapes, steps)
    assert losses(again, range(2, 5)) == expected
    assert again.optimizer_steps == 5
    assert expected[-1] != expected[0]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def trained(topology: Topology, request: pytest.FixtureRequest) -> tuple[str, dict[str, tuple[State, list[float]]]]:
    """By place: the fp32 state after two steps, and the loss of the third and the fourth."""
    found = {}
    for place, how in PLACES.items():
        engine = build(topology, **how, optimizer=request.param)
        losses(engine, range(2))
        state = copied(engine)
        found[place] = (state, losses(engine, range(2, 4)))
    return request.param, found


@pytest.mark.parametrize(("saved", "loaded"), HANDOVERS)
def test_state_of_one_zero_stage_and_offload_continues_under_another(
    topology: Topology, trained: tuple[str, dict[str, tuple[State, list[float]]]], saved: str, loaded: str
) -> None:
    optimizer, found = trained
    state, expected = found[saved]
    engine = build(topology, **PLACES[loaded], optimizer=optimizer, seed=1)
    restore(engine, state, engine.parameter_shapes(), 2)
    assert losses(engine, range(2, 4)) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_was_loaded_for_evaluation_is_trained(topology: Topology) -> None:
    model = tiny_model().eval()
    how = OptimizerSpec("adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    Engine(model, build_optimizer(model, how), spec=EngineSpec(0, "fp32", 4, 1, 1.0), topology=topology)
    assert all(module.training for module in model.modules())


def test_the_first_weights_reach_the_masters_unchanged(topology: Topology) -> None:
    for stage in STAGES:
        engine = build(topology, stage)
        flat = whole(copied(engine), engine.parameter_shapes())
        for name, parameter in tiny_model().named_parameters():
            assert torch.equal(flat["param", name], parameter.detach().flatten()), (stage, name)
            assert not flat["exp_avg", name].any() and not flat["exp_avg_sq", name].any()


@pytest.mark.parametrize("stage", STAGES)
def test_accumulated_micro_batches_take_the_step_of_one_big_batch(topology: Topology, stage: int) -> None:
    big, small = build(topology, stage), build(topology, stage, accumulate=4)
    assert train_step(big, 0) == pytest.approx(train_step(small, 0, micro_batches=4), rel=1e-6)
    shapes = big.parameter_shapes()
    ours, theirs = whole(copied(big), shapes), whole(copied(small), shapes)
    for name in shapes:
        scale = ours["exp_avg", name].abs().max()
        torch.testing.assert_close(theirs["exp_avg", name], ours["exp_avg", name], rtol=0, atol=1e-5 * float(scale))


@pytest.mark.parametrize("stage", STAGES)
def test_the_returned_norm_is_that_before_clipping_and_the_step_uses_the_clipped_gradient(
    topology: Topology, stage: int
) -> None:
    engine, plain = build(topology, stage), tiny_model()
    ids = rows(0)
    for model, backward in ((engine.model, engine.backward), (plain, torch.Tensor.backward)):
        logits = model(input_ids=ids).logits.float()
        backward(3 * cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
    assert norm > 1.5
    assert float(engine.step(1e-3)) == pytest.approx(norm, rel=1e-5)
    moments = whole(copied(engine), engine.parameter_shapes())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(moments["exp_avg", name], 0.1 * parameter.grad.flatten(), rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_replicated_state_is_shared_out_over_any_number_of_ranks(topology: Topology, world_size: int) -> None:
    engine = build(topology, 0)
    held = {name: [] for name in engine.parameter_shapes()}
    for rank in range(world_size):
        engine.topology = Topology(rank, world_size, topology.device)
        for fragment in engine.owned_fragments():
            held[fragment.name] += range(fragment.start, fragment.start + fragment.numel)
    engine.topology = topology
    for name, shape in engine.parameter_shapes().items():
        assert held[name] == list(range(torch.Size(shape).numel()))


SEVERAL_RANKS = """
import sys, torch.distributed as dist
from cpt.failures import leave
sys.path.insert(0, sys.argv[1])
from test_engine import PLACES, build, copied, losses, restore, start_process_group, stop_process_group, whole

topology = start_process_group()
world, every = topology.world_size, list(PLACES.values())
places = every if world == 2 else every[1:5:3] + every[6:7]
for optimizer, chosen in (("adamw", places), ("muon", places[-3:])):
    for how, next_how in zip(chosen, chosen[1:] + chosen[:1]):
        engine = build(topology, **how, optimizer=optimizer)
        mine = losses(engine, [0, 1])
        held, taken = [None] * world, [None] * world
        dist.all_gather_object(held, copied(engine))
        sizes = [sum(tensors["param"].numel() for _, _, tensors in part) for part in held]
        flat = whole(sum(held, []), engine.parameter_shapes())
        assert sum(sizes) == sum(t.numel() for (kind, _), t in flat.items() if kind == "param"), sizes
        assert min(sizes) > 0 and not any(tensor.isnan().any() for tensor in flat.values())
        other = build(topology, **next_how, optimizer=optimizer, seed=1)
        restore(other, sum(held, []), engine.parameter_shapes(), 2)
        dist.all_gather_object(taken, mine + losses(other, [2, 3]))
        if topology.rank == 0:
            print("LOSSES", optimizer, *map(sum, zip(*taken)), flush=True)
stop_process_group()
leave(0)  # as the product does: the interpreter's shutdown aborts now and then while gloo's threads live
"""


def run_ranks(program: str, world_size: int) -> list[str]:
    """What each rank printed."""
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shared["MALLOC_MMAP_THRESHOLD_"] = "65536"  # memory that is freed is given back: peaks are those of tensors
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(outputs)
    return outputs


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_state_wherever_it_is_kept_and_train_like_one(topology: Topology, world_size: int) -> None:
    output = run_ranks(SEVERAL_RANKS, world_size)[0]
    alone = {name: losses(build(topology, 0, optimizer=name), range(4)) for name in ("adamw", "muon")}
    found = [line.split()[1:] for line in output.splitlines() if line.startswith("LOSSES")]
    assert len(found) == (len(PLACES) + 3 if world_size == 2 else 6)
    for optimizer, *together in found:
        assert list(map(float, together)) == pytest.approx(alone[optimizer], rel=1e-6)


SHARDED_AT_ONCE = """
import sys, torch
from cpt.failures import leave
sys.path.insert(0, sys.argv[1])
from test_engine import *
import contextlib
from cpt.train.engine import shard_parameters
from cpt.train.one_by_one import empty_parameters

topology = start_process_group()
how = OptimizerSpec("adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
spec = EngineSpec(3, "fp32", 2, 1, max_grad_norm=1.0, extra=EVERY_ONE_CUT)
with empty_parameters() if topology.rank else contextlib.nullcontext():
    model = tiny_model(seed=topology.rank)
shard_parameters(model, spec, topology)
engine = Engine(model, build_optimizer(model, how), spec=spec, topology=topology)
assert losses(engine, range(3)) == losses(build(topology, 3, extra=EVERY_ONE_CUT), range(3))
assert {name: b.dtype for name, b in model.named_buffers()} == {n: b.dtype for n, b in tiny_model().named_buffers()}


def status(field):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024


class Big(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in range(96))


whole = 96 * 1024 * 1024 * 4
with empty_parameters():  # as in a resumed run, where each rank reads its own part from the checkpoint
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew: an earlier one would hide this one
    before, model = status("VmRSS"), Big()
    shard_parameters(model, spec, topology)
print("SHARE", (status("VmHWM") - before) / whole, flush=True)
stop_process_group()
leave(0)
"""


def test_a_model_is_cut_up_as_it_is_built_and_no_rank_ever_holds_a_whole_copy() -> None:
    for output in run_ranks(SHARDED_AT_ONCE, 2):
        (share,) = (float(line.split()[1]) for line in output.splitlines() if line.startswith("SHARE"))
        assert 0.4 < share < 0.8  # half of it, as one of two ranks; below: the measurement saw nothing


# Every installation of DeepSpeed compiles async_io anew, for five minutes of one core.
@pytest.mark.skipif(not os.environ.get("CPT_TEST_NVME"), reason="compiles DeepSpeed's async_io; run: make test-nvme")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_swapped_to_files_trains_saves_and_resumes_like_state_in_memory(
    topology: Topology, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(seed: int = 0) -> torch.nn.Module:  # groups under a megabyte are never swapped
        torch.manual_seed(seed)
        sizes = {"vocab_size": 61, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))

    monkeypatch.setattr(sys.modules[__name__], "tiny_model", model)
    check_machine(EngineSpec(3, "fp32", 1, 1, 1.0, offload="nvme", nvme_dir=tmp_path), topology)
    # on the host too the norm is added up gradient by gradient: state that is not offloaded is an ulp away
    expected_engine = build(topology, 3, optimizer=optimizer, offload="cpu")
    engine = build(topology, 3, optimizer=optimizer, offload="nvme", nvme_dir=tmp_path)
    assert losses(engine, range(2)) == losses(expected_engine, range(2))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.swp")) > 2**20
    state, expected = copied(engine), losses(expected_engine, range(2, 4))
    assert losses(engine, range(2, 4)) == expected
    again = build(topology, 3, optimizer=optimizer, offload="nvme", nvme_dir=tmp_path / "again", seed=1)
    restore(again, state, again.parameter_shapes(), 2)
    assert losses(again, range(2, 4)) == expected
    elsewhere = build(topology, 0, optimizer=optimizer, seed=1)
    restore(elsewhere, state, elsewhere.parameter_shapes(), 2)
    assert losses(elsewhere, range(2, 4)) == pytest.approx(expected, rel=1e-6)


def test_what_a_machine_lacks_is_said_before_the_start(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"quantized_communication packs weights with GPU kernels"):
        check_machine(EngineSpec(3, "fp32", 1, 1, 1.0, quantized_communication=True), topology)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match=r"this machine lacks g\+\+, ninja.*or use deepspeed.offload=cpu"):
        check_machine(EngineSpec(3, "fp32", 1, 1, 1.0, offload="nvme", nvme_dir=Path("/nvme")), topology)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_refused_and_the_weights_stay(topology: Topology, stage: int) -> None:
    engine = build(topology, stage)
    before = {fragment.name: fragment.state["param"].clone() for fragment in engine.fragments()}
    engine.backward(engine.model(input_ids=rows(0), use_cache=False).logits.sum() * float("inf"))
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient is not finite; the weights were not updated"):
        engine.step(1e-2)
    for fragment in engine.fragments():
        assert torch.equal(fragment.state["param"], before[fragment.name])
