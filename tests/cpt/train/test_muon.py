"""Muon against the textbook and against torch's own; how matrices are dealt out; that loss falls."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from cpt.train.muon import MOMENTUM, Cut, _Exchange, deal, orthogonal_update
from cpt.train.optim import OptimizerSpec, block_matrices, build_optimizer, parameter_groups

MUON = OptimizerSpec("muon", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def llama(*, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))


def naive_update(matrix: torch.Tensor) -> torch.Tensor:
    """Five rounds of the quintic on the singular values themselves."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right * 0.2 * max(matrix.shape) ** 0.5


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
def test_the_update_is_the_polynomial_of_the_singular_values_and_as_large_as_one_of_adamw(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    update = orthogonal_update(matrix)
    torch.testing.assert_close(update.double(), naive_update(matrix), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(orthogonal_update(1e-4 * matrix), update, rtol=1e-3, atol=1e-4)  # its scale is no matter
    assert 0.12 < float(update.square().mean().sqrt()) < 0.28  # AdamW's is 0.2 to 0.4 in practice


def test_steps_are_those_of_torch_muon_up_to_the_bf16_in_which_that_computes() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 10)) for _ in range(2))
    model = torch.nn.Module()
    model.matrix = ours
    optimizer = build_optimizer(model, MUON)
    optimizer.state[ours] = {"momentum_buffer": torch.zeros_like(ours)}
    cut = Cut({"matrix": (6, 10)}, {"matrix": (0, 0, 60)})
    optimizer.share_out(ours, cut, device=torch.device("cpu"), replicated=True)  # type: ignore[attr-defined]
    optimizer.param_groups[0]["lr"] = 0.01
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=4 * 0.01 * 0.2 * 10**0.5 * 0.02)
    torch.testing.assert_close(optimizer.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else_each_once(tied: bool) -> None:
    model = llama(tied=tied)
    taken = {id(parameter) for parameter in block_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in taken}
    assert len(names) == 2 * 7 and all(name.startswith("model.layers.") for name in names)
    groups = parameter_groups(model, MUON)
    held = [id(parameter) for parameter in chain.from_iterable(group["params"] for group in groups)]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    kinds = {tuple(group["state_kinds"]) for group in groups}
    assert kinds == {("momentum_buffer",), ("exp_avg", "exp_avg_sq")}


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(st.integers(1, 99), st.integers(1, 99)), max_size=20),
    st.integers(1, 9),
)
def test_every_matrix_is_dealt_to_one_rank_and_no_rank_gets_more_than_its_share_and_one_matrix(
    shapes: dict[str, tuple[int, int]], world: int
) -> None:
    owned = deal(shapes, world)
    assert sorted(chain.from_iterable(owned)) == sorted(shapes) and len(owned) == world
    cost = {name: min(shape) * shape[0] * shape[1] for name, shape in shapes.items()}
    heaviest = max((sum(cost[name] for name in names) for names in owned), default=0)
    assert heaviest <= sum(cost.values()) / world + max(cost.values(), default=0)


def test_a_rank_without_a_matrix_exchanges_nothing_on_its_own_device() -> None:
    """nccl knows no tensors of the host; more ranks than matrices is usual."""
    (nothing,) = _Exchange(Cut({}, {}), torch.device("meta"), 1)._swap([[]], [0])
    assert nothing.device.type == "meta" and nothing.numel() == 0
