"""The engine against its promises, with real DeepSpeed: fragments cover the state, and any ZeRO stage continues any other."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from cpt.checkpoint.portable import Fragment
from cpt.train.engine import (
    Engine,
    EngineSpec,
    Topology,
    _free_port,
    deepspeed_config,
    start_process_group,
    stop_process_group,
)
from cpt.train.guard import NonFiniteError
from cpt.train.optim import build_adamw

ROOT = Path(__file__).resolve().parents[3]
STAGES = (0, 1, 2, 3)
HANDOVERS = [(saved, loaded) for saved in STAGES for loaded in STAGES if saved != loaded]
State = list[tuple[str, int, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_process_group()
    stop_process_group()


def tiny_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def build(topology: Topology, stage: int, precision: str = "fp32", *, accumulate: int = 1, seed: int = 0) -> Engine:
    model = tiny_model(seed)
    optimizer = build_adamw(model, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    spec = EngineSpec(
        stage, precision, 4 // (accumulate * topology.world_size), accumulate, max_grad_norm=1.0, extra={}
    )
    return Engine(model, optimizer, spec=spec, topology=topology)


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
    kinds = ("param", "exp_avg", "exp_avg_sq")
    flat = {
        (kind, name): torch.full((torch.Size(shape).numel(),), torch.nan)
        for name, shape in shapes.items()
        for kind in kinds
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
@pytest.mark.parametrize("stage", STAGES)
def test_fragments_hold_every_element_once_and_restoring_them_repeats_the_run_bit_for_bit(
    topology: Topology, stage: int, precision: str
) -> None:
    engine = build(topology, stage, precision)
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
    again = build(topology, stage, precision, seed=1)  # other weights: all must come from the fragments
    restore(again, state, shapes, steps)
    assert losses(again, range(2, 5)) == expected
    assert again.optimizer_steps == 5
    assert expected[-1] != expected[0]


@pytest.fixture(scope="module")
def trained(topology: Topology) -> dict[int, tuple[State, list[float]]]:
    """By ZeRO stage: the fp32 state after two steps, and the loss of the third and the fourth."""
    found = {}
    for stage in STAGES:
        engine = build(topology, stage)
        losses(engine, range(2))
        state = copied(engine)
        found[stage] = (state, losses(engine, range(2, 4)))
    return found


@pytest.mark.parametrize(("saved", "loaded"), HANDOVERS)
def test_state_of_one_zero_stage_continues_under_another(
    topology: Topology, trained: dict[int, tuple[State, list[float]]], saved: int, loaded: int
) -> None:
    state, expected = trained[saved]
    engine = build(topology, loaded, seed=1)
    restore(engine, state, engine.parameter_shapes(), 2)
    assert losses(engine, range(2, 4)) == pytest.approx(expected, rel=1e-6)


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


TWO_RANKS = """
import sys, torch.distributed as dist
from cpt.failures import leave
sys.path.insert(0, sys.argv[1])
from test_engine import STAGES, build, copied, losses, restore, start_process_group, stop_process_group, whole

topology = start_process_group()
for stage in STAGES:
    engine = build(topology, stage)
    mine = losses(engine, [0, 1])
    held, taken = [None, None], [None, None]
    dist.all_gather_object(held, copied(engine))
    sizes = [sum(tensors["param"].numel() for _, _, tensors in part) for part in held]
    flat = whole(held[0] + held[1], engine.parameter_shapes())
    assert min(sizes) > 0 and sum(sizes) == sum(t.numel() for (kind, _), t in flat.items() if kind == "param"), sizes
    assert not any(tensor.isnan().any() for tensor in flat.values())
    other = build(topology, (stage + 2) % 4, seed=1)
    restore(other, held[0] + held[1], engine.parameter_shapes(), 2)
    dist.all_gather_object(taken, mine + losses(other, [2, 3]))
    if topology.rank == 0:
        print("LOSSES", *map(sum, zip(*taken)), flush=True)
stop_process_group()
leave(0)  # as the product does: the interpreter's shutdown aborts now and then while gloo's threads live
"""


def test_two_ranks_share_the_state_under_every_stage_and_train_like_one(topology: Topology) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_RANKS, str(Path(__file__).parent)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    alone = losses(build(topology, 0), range(4))
    found = [list(map(float, line.split()[1:])) for line in outputs[0].splitlines() if line.startswith("LOSSES")]
    assert len(found) == len(STAGES)
    for together in found:
        assert together == pytest.approx(alone, rel=1e-6)


def spec(stage: int, precision: str, micro: int, accumulate: int, **extra: object) -> EngineSpec:
    return EngineSpec(stage, precision, micro, accumulate, max_grad_norm=1.0, extra=extra)


@pytest.mark.parametrize(
    ("given", "world_size", "derived"),
    [
        (
            spec(0, "fp32", 4, 1),
            1,
            {
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 1,
                "train_batch_size": 4,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": 0},
            },
        ),
        (
            spec(2, "bf16", 2, 4),
            8,
            {
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 4,
                "train_batch_size": 64,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": 2},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
        ),
        (
            spec(3, "bf16", 1, 2, zero_optimization={"overlap_comm": True}, wall_clock_breakdown=True),
            512,
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 2,
                "train_batch_size": 1024,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": 3, "overlap_comm": True},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
                "wall_clock_breakdown": True,
            },
        ),
    ],
    ids=["one process", "one host of 8", "64 hosts of 8"],
)
def test_the_deepspeed_dictionary_is_derived(given: EngineSpec, world_size: int, derived: dict[str, object]) -> None:
    always = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    assert deepspeed_config(given, world_size=world_size) == always | derived


def test_bf16_without_sharding_keeps_fp32_weights_under_autocast() -> None:
    config = deepspeed_config(spec(0, "bf16", 1, 1), world_size=1)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and "bf16" not in config


def test_extra_keys_are_merged_deeply_and_win() -> None:
    given = spec(1, "fp32", 1, 1, zero_optimization={"reduce_bucket_size": 5}, gradient_clipping=0.5)
    config = deepspeed_config(given, world_size=1)
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 5} and config["gradient_clipping"] == 0.5
    assert given.extra["zero_optimization"] == {"reduce_bucket_size": 5}  # the user's own mapping is left alone


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_refused_and_the_weights_stay(topology: Topology, stage: int) -> None:
    engine = build(topology, stage)
    before = {fragment.name: fragment.state["param"].clone() for fragment in engine.fragments()}
    engine.backward(engine.model(input_ids=rows(0), use_cache=False).logits.sum() * float("inf"))
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient is not finite; the weights were not updated"):
        engine.step(1e-2)
    for fragment in engine.fragments():
        assert torch.equal(fragment.state["param"], before[fragment.name])
