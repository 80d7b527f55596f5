"""Shapes, routings, and the comparison that judges every expert kernel: against float64, next to `reference`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from btx_kernels import reference
from btx_kernels._activations import NAMES as ACTIVATIONS
from hypothesis import strategies as st
from torch import Tensor

NAMES = ("output", "grad of x", "grad of gate_up", "grad of down", "grad of weight")
Experts = Callable[..., Tensor]


class Case(NamedTuple):
    """A layer's sizes, how its tokens are routed, and a seed for its numbers."""

    tokens: int
    k: int
    experts: int
    width: int
    half: int
    routing: str = "mixed"
    seed: int = 0
    strided: bool = False
    activation: str = "silu"


ROUTINGS = ("mixed", "one", "few", "away", "all away")


@st.composite
def cases(draw: Any, most: int = 40) -> Case:
    """Any small case: no token, one, odd numbers; experts without a token, one with all, some on other ranks."""
    experts = draw(st.integers(1, 5))
    size = st.integers(1, most)
    return Case(
        draw(st.integers(0, most)), draw(st.integers(1, experts)), experts, draw(size), draw(size),
        draw(st.sampled_from(ROUTINGS)), draw(st.integers(0, 99)), draw(st.booleans()),
        draw(st.sampled_from(ACTIVATIONS)),
    )  # fmt: skip


def tensors(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    """x, gate_up, down and weight with numbers of order one in `dtype`; the index; a gradient of the output."""
    chance = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=chance, dtype=torch.float64) * scale).to(dtype).to(device)

    t, k, e, d, f = case[:5]
    x, gate_up, down = normal(t, d), normal(e, 2 * f, d, scale=d**-0.5), normal(e, d, f, scale=f**-0.5)
    index = torch.rand(t, e, generator=chance).argsort(1)[:, :k]
    if case.routing == "one":
        index = torch.full((t, k), e - 1)
    if case.routing == "few":
        index = index % max(1, e // 2)
    if case.routing in ("away", "all away"):
        index = index.masked_fill(torch.rand(t, k, generator=chance) < (0.5 if case.routing == "away" else 2.0), e)
    kind = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(t, k, generator=chance, dtype=torch.float64).to(kind).to(device)
    grad, index = normal(t, d), index.to(device)
    if case.strided:
        x, weight, grad, index, gate_up, down = (a.mT.contiguous().mT for a in (x, weight, grad, index, gate_up, down))
    return [x, gate_up, down, weight], index, grad


def results(
    kernel: Experts, inputs: list[Tensor], index: Tensor, grad: Tensor, activation: str = "silu"
) -> list[Tensor]:
    """The output and the gradients of all four inputs that have one."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    out = kernel(*leaves[:3], index, leaves[3], activation)
    out.backward(grad)
    return [out, *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)]


def compare(kernel: Experts, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """AssertionError unless a kernel is, against float64, at most three times as far off as `reference` in its dtype.

    The tolerance adds eight units in the last place of the largest value of each result, for rounding in another order.
    The root of the sum of squares may be at most 1.5 times the reference's (3 times for float32 and wider) plus two
    units in the last place.
    """
    inputs, index, grad = tensors(case, dtype, device)
    found = results(kernel, inputs, index, grad, case.activation)
    exact = results(reference.experts, [t.double() for t in inputs], index, grad.double(), case.activation)
    usual = results(reference.experts, inputs, index, grad, case.activation)
    for name, ours, truth, theirs in zip(NAMES, found, exact, usual, strict=True):
        assert ours.shape == truth.shape, name
        assert ours.dtype == theirs.dtype, name
        if not truth.numel():
            continue
        off, allowed = ((t.double() - truth).abs().max() for t in (ours, theirs))
        room = 3 * allowed + 8 * torch.finfo(dtype).eps * truth.abs().max()
        assert off <= room, f"{name}: off by {off:.2e}, allowed {room:.2e}; {case}"
        off, allowed = ((t.double() - truth).norm() for t in (ours, theirs))
        room = (1.5 if dtype.itemsize < 4 else 3) * allowed + 2 * torch.finfo(dtype).eps * truth.norm()
        assert off <= room, f"{name}: off by {off:.2e} in all, allowed {room:.2e}; {case}"
