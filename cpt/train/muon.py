"""Muon (arXiv 2502.16982) for matrices that may be cut into pieces over the ranks, AdamW for everything else.

Momentum lives in the same flat pieces as AdamW's moments, so that it is sharded, offloaded and saved like them. Only
the orthogonalisation needs a whole matrix: each is put together on one rank, the work being dealt out by its cost,
and the result goes back in pieces. Two exchanges per step, of about the bytes of the matrices each.

Why not the Muon of ``deepspeed.runtime.zero.muon``: it writes the orthogonalised update into the gradient *before*
the norm is taken, so that norm and clipping are those of the update, AdamW's gradients are clipped along with it, and a
learning rate means something else at every ``max_grad_norm``. Here norm and clipping come first, as with AdamW.

An update is scaled by 0.2 * sqrt(max(rows, columns)), which gives it the root mean square of an AdamW update: a rate
and a decay found with AdamW can be kept (section 2.2 of the paper).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
import torch.distributed as dist

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's coefficients, five rounds
ROUNDS = 5
Span = tuple[int, int, int]  # first element of the matrix held here, where in the flat tensor, how many


@dataclass(frozen=True)
class Cut:
    """A flat tensor of this rank: which matrices have elements in it. Shapes and order are the same on all ranks."""

    shapes: dict[str, tuple[int, int]]  # every matrix of the group, by name
    held: dict[str, Span]  # the part of it that is here, if any


class Muon(torch.optim.AdamW):
    """``param_groups`` whose ``state_kinds`` are ``momentum_buffer`` take Muon, the others fused AdamW."""

    def __init__(self, groups: Sequence[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self._updates: dict[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] = {}

    def share_out(self, flat: torch.Tensor, cut: Cut, *, device: torch.device, replicated: bool) -> None:
        """Say what lies in a flat tensor of a Muon group. All ranks call it for the same groups in the same order.

        Where the state is ``replicated`` every rank orthogonalises everything and nothing travels.
        """
        world = 1 if replicated or not dist.is_initialized() else dist.get_world_size()
        self._updates[flat] = _Exchange(cut, device, world).updates

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not _is_muon(group)]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in filter(_is_muon, groups):
            for flat in group["params"]:
                if flat.grad is not None and flat in self._updates:
                    self._move(flat, lr=group["lr"], decay=group["weight_decay"])

    def _move(self, flat: torch.Tensor, *, lr: float, decay: float) -> None:
        momentum, scale = self.state[flat]["momentum_buffer"], getattr(self, "grad_scale", None)
        gradient: Any = flat.grad
        gradient = gradient if scale is None else gradient / scale.to(gradient.device)  # as the fused AdamW does
        momentum.lerp_(gradient, 1 - MOMENTUM)
        looking_ahead = torch.lerp(gradient, momentum, MOMENTUM)  # Nesterov
        update = self._updates[flat](looking_ahead.reshape(-1)).view(flat.shape)
        flat.mul_(1 - lr * decay).add_(update, alpha=-lr)


def _is_muon(group: dict[str, Any]) -> bool:
    return "momentum_buffer" in group["state_kinds"]


def orthogonal_update(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, columns) -> an update of AdamW's size with (nearly) equal singular values. Computed in bf16 on a GPU."""
    a, b, c = NEWTON_SCHULZ
    rows, columns = matrix.shape
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x.T if rows > columns else x
    x = x / x.norm().clamp(min=1e-7)  # singular values at most 1
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.T if rows > columns else x
    return x.to(matrix.dtype) * (0.2 * sqrt(max(rows, columns)))


class _Exchange:
    """Brings each matrix of one flat tensor together on one rank, and its update back."""

    def __init__(self, cut: Cut, device: torch.device, world: int) -> None:
        self.cut, self.device, self.world = cut, device, world
        held: list[Any] = [cut.held]
        if world > 1:
            held = [None] * world
            dist.all_gather_object(held, cut.held)
        self.held: list[dict[str, Span]] = held
        self.rank = dist.get_rank() if world > 1 else 0
        self.owned: list[list[str]] = deal(cut.shapes, world)

    def updates(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat tensor of what to orthogonalise -> flat tensor of the updates, 0 where it is padding."""
        matrices = self._gathered(flat)
        for name, matrix in matrices.items():
            matrix.copy_(orthogonal_update(matrix.view(self.cut.shapes[name])).reshape(-1))
        return self._returned(matrices, flat)

    def _gathered(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        mine = self.held[self.rank]
        pieces = [[flat[at : at + n] for _, at, n in _spans(mine, names)] for names in self.owned]
        arrived = self._swap(pieces, [self._numel(rank, self.rank) for rank in range(self.world)])
        matrices = {name: flat.new_empty(prod(self.cut.shapes[name]), device=self.device) for name in self._own()}
        for rank, piece in enumerate(arrived):
            at = 0
            for name in self._own():
                if span := self.held[rank].get(name):
                    matrices[name][span[0] : span[0] + span[2]] = piece[at : at + span[2]]
                    at += span[2]
        return matrices

    def _returned(self, matrices: dict[str, torch.Tensor], flat: torch.Tensor) -> torch.Tensor:
        pieces = [
            [matrices[name][span[0] : span[0] + span[2]] for name in self._own() if (span := held.get(name))]
            for held in self.held
        ]
        arrived = self._swap(pieces, [self._numel(self.rank, owner) for owner in range(self.world)])
        update = torch.zeros_like(flat)
        for owner, piece in enumerate(arrived):
            position = 0
            for _, at, n in _spans(self.held[self.rank], self.owned[owner]):
                update[at : at + n] = piece[position : position + n]
                position += n
        return update

    def _own(self) -> list[str]:
        return self.owned[self.rank]

    def _numel(self, rank: int, owner: int) -> int:
        """Elements that ``rank`` holds of the matrices that ``owner`` orthogonalises."""
        return sum(n for _, _, n in _spans(self.held[rank], self.owned[owner]))

    def _swap(self, pieces: list[list[torch.Tensor]], sizes: list[int]) -> tuple[torch.Tensor, ...]:
        """Send ``pieces[rank]`` to each rank; returns what came from each, ``sizes[rank]`` elements."""
        outgoing = torch.cat(
            [part.reshape(-1).to(self.device) for parts in pieces for part in parts]
            or [torch.empty(0, device=self.device)]
        )
        if self.world == 1:
            return (outgoing,)
        incoming = outgoing.new_empty(sum(sizes))
        lengths = [sum(part.numel() for part in parts) for parts in pieces]
        dist.all_to_all_single(incoming, outgoing, output_split_sizes=sizes, input_split_sizes=lengths)
        return torch.split(incoming, sizes)


def _spans(held: dict[str, Span], names: Sequence[str]) -> list[Span]:
    return [held[name] for name in names if name in held]


def deal(shapes: dict[str, tuple[int, int]], world: int) -> list[list[str]]:
    """Matrices to ranks, the most expensive first, each to the rank with the least work so far; a pure function."""
    cost = {name: min(shape) * prod(shape) for name, shape in shapes.items()}
    owned: list[list[str]] = [[] for _ in range(world)]
    load = [0] * world
    for name in sorted(shapes, key=lambda name: (-cost[name], name)):
        rank = load.index(min(load))
        owned[rank].append(name)
        load[rank] += cost[name]
    return owned
