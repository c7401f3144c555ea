"""Parameter groups: every trained parameter once, matrices decay, gains and biases do not."""

import torch
from torch import nn

from cpt.train.optim import OptimizerSpec, build_optimizer, parameter_groups

ADAMW = OptimizerSpec("adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 3)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight  # tied


def test_groups_hold_every_parameter_exactly_once_tied_ones_too() -> None:
    model = Tiny()
    held = [id(parameter) for group in parameter_groups(model, ADAMW) for parameter in group["params"]]  # type: ignore[attr-defined]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_matrices_and_embeddings_decay_but_norms_and_biases_do_not() -> None:
    model = Tiny()
    decay = {
        id(parameter): group["weight_decay"]
        for group in parameter_groups(model, ADAMW)
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    named = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert named == {
        "embedding.weight": 0.1,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "linear.weight": 0.1,
        "linear.bias": 0.0,
    }


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out() -> None:
    model = Tiny()
    for vector in (model.norm.weight, model.norm.bias, model.linear.bias):
        vector.requires_grad_(False)
    (group,) = parameter_groups(model, ADAMW)
    assert group["weight_decay"] == 0.1 and len(group["params"]) == 2  # type: ignore[arg-type]


def test_one_step_is_adamw_by_hand() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = build_optimizer(model, ADAMW)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0]  # the trainer states every rate
    optimizer.param_groups[0]["lr"] = 0.01
    model.weight.grad = torch.full((2, 2), 0.5)
    optimizer.step()
    # first update: both moments are corrected back to the gradient, so the direction is its sign; decay is decoupled
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 2), 1.0 * (1 - 0.01 * 0.1) - 0.01))
