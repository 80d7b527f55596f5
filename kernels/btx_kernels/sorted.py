"""Tokens sorted once, a plain matrix product per expert on its run of rows, and a backward pass written by hand.

For the CPU, and any device that has matrix products. Runs in every floating type, float64 included. What it saves:

- Every product writes into its place of a buffer, and uses the faster library (`_products`); nothing of the size of all
  experts is allocated or cleared per expert.
- Between the passes it keeps the pre-activations (S, 2F) and the experts' outputs (S, D). The gathered inputs and the
  activations are recomputed, which costs 2 % of the backward pass; their buffers have one expert's rows, stay in the
  cache and are reused from expert to expert.
- The gradient of a routing weight comes from the kept output, a dot product over D instead of the wider F.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from btx_kernels._activations import activate, gradient, known
from btx_kernels._order import order
from btx_kernels._products import product

CACHED = 2**18  # elements per chunk where each is touched several times, so that they stay in a core's cache


def experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, activation: str = "silu"
) -> Tensor:  # fmt: skip
    """out_t = Σ_k weight_tk · down_e (act(gate_e x_t) ⊙ (up_e x_t)), e = index_tk; see `btx_kernels.reference`.

    `x_TD` and the experts' weights have one dtype; `weight_TK` may have a wider one, in which the sum over k is taken.
    An index of E stands for an expert elsewhere and adds nothing.
    """
    tensors = (x_TD, gate_up_EFD, down_EDF, index_TK, weight_TK)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    out: Tensor = _Sorted.apply(*tensors, keep, known(activation))
    return out


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, keep: bool,
        activation: str,
    ) -> Tensor:  # fmt: skip
        by_expert = order(index_TK, len(gate_up_EFD))
        token_S = by_expert.choice_S // index_TK.shape[1]
        runs = [0, *by_expert.ends_E.tolist()]
        hidden_SF = x_TD.new_empty(runs[-1] if keep else 0, gate_up_EFD.shape[1])
        out_SD = _rows(x_TD, runs[-1])
        buffer = _Buffers(x_TD, max(b - a for a, b in pairwise(runs)))
        for e, (a, b) in enumerate(pairwise(runs)):
            if a == b:
                continue
            x_ND = torch.index_select(x_TD, 0, token_S[a:b], out=buffer.of(0, b - a, x_TD.shape[1]))
            hidden_NF = hidden_SF[a:b] if keep else buffer.of(2, b - a, gate_up_EFD.shape[1])
            gate_NF, up_NF = product(x_ND, gate_up_EFD[e].T, hidden_NF).chunk(2, dim=1)
            act_NF = activate(gate_NF, activation, buffer.of(1, b - a, up_NF.shape[1])).mul_(up_NF)
            product(act_NF, down_EDF[e].T, out_SD[a:b])
        ctx.save_for_backward(x_TD, gate_up_EFD, down_EDF, weight_TK, hidden_SF, out_SD, *by_expert[:2])
        ctx.runs, ctx.activation = runs, activation
        return _sum(out_SD, by_expert.place_S, weight_TK, index_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_EFD, down_EDF, weight_TK, hidden_SF, out_SD, choice_S, place_S = ctx.saved_tensors
        runs: list[int] = ctx.runs
        wants_x, wants_up, wants_down = ctx.needs_input_grad[:3]
        (width, half), tokens = (x_TD.shape[1], down_EDF.shape[2]), choice_S // weight_TK.shape[1]
        weight_S1 = weight_TK.reshape(-1, 1)[choice_S[: runs[-1]]]
        grad_up_EFD = torch.empty_like(gate_up_EFD) if wants_up else None
        grad_down_EDF = torch.empty_like(down_EDF) if wants_down else None
        grad_weight_S = weight_TK.new_zeros(len(choice_S))
        grad_x_SD = _rows(x_TD, runs[-1]) if wants_x else None
        buffer = _Buffers(x_TD, max(b - a for a, b in pairwise(runs)))
        for e, (a, b) in enumerate(pairwise(runs)):
            n = b - a
            if not n:
                for grad in (grad_up_EFD, grad_down_EDF):
                    None if grad is None else grad[e].zero_()
                continue
            grad_ND = torch.index_select(grad_TD, 0, tokens[a:b], out=buffer.of(0, n, width))
            grad_weight_S[choice_S[a:b]] = _dots(grad_ND, out_SD[a:b], weight_TK.dtype)
            grad_ND.mul_(weight_S1[a:b])
            gate_NF, up_NF = hidden_SF[a:b].chunk(2, dim=1)
            act_NF = activate(gate_NF, ctx.activation, buffer.of(1, n, half))
            if grad_down_EDF is not None:
                product(grad_ND.T, torch.mul(act_NF, up_NF, out=buffer.of(2, n, half)), grad_down_EDF[e])
            if not (wants_x or wants_up):
                continue
            grad_act_NF = product(grad_ND, down_EDF[e], buffer.of(2, n, half))
            grad_hidden_NF = buffer.of(3, n, 2 * half)
            grad_gate_NF, grad_up_NF = grad_hidden_NF.chunk(2, dim=1)
            torch.mul(grad_act_NF, act_NF, out=grad_up_NF)
            gradient(grad_act_NF.mul_(up_NF), gate_NF, ctx.activation, grad_gate_NF)
            if grad_up_EFD is not None:
                x_ND = torch.index_select(x_TD, 0, tokens[a:b], out=buffer.of(0, n, width))
                product(grad_hidden_NF.T, x_ND, grad_up_EFD[e])
            if grad_x_SD is not None:
                product(grad_hidden_NF, gate_up_EFD[e], grad_x_SD[a:b])
        grad_x_TD = None if grad_x_SD is None else _sum(grad_x_SD, place_S, None, weight_TK.shape[1])
        return grad_x_TD, grad_up_EFD, grad_down_EDF, None, grad_weight_S.view_as(weight_TK), None, None


class _Buffers:
    """Scratch buffers by number, allocated on first use and shared by all experts."""

    def __init__(self, like: Tensor, rows: int) -> None:
        self.like, self.rows = like, rows
        self.made: dict[int, Tensor] = {}

    def of(self, number: int, rows: int, width: int) -> Tensor:
        if number not in self.made:
            self.made[number] = self.like.new_empty(self.rows, width)
        return self.made[number][:rows]


def _rows(like: Tensor, rows: int) -> Tensor:
    """An uninitialised buffer of `rows` rows, and a row of zeros after them for choices whose expert is elsewhere."""
    room = like.new_empty(rows + 1, like.shape[1])
    room[-1].zero_()
    return room


def _dots(a_ND: Tensor, b_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """Row by row Σ_d a b, taken in `dtype`."""
    rows = max(1, CACHED // a_ND.shape[1])
    parts = zip(a_ND.split(rows), b_ND.split(rows), strict=True)
    return torch.cat([(a.to(dtype) * b).sum(1) for a, b in parts])


def _sum(rows_SD: Tensor, place_S: Tensor, weight_TK: Tensor | None, k: int) -> Tensor:
    """Σ_k weight_tk · row of choice (t, k), taken in float32 or wider and returned in the dtype of the rows."""
    width, dtype = rows_SD.shape[1], torch.promote_types(rows_SD.dtype, torch.float32)
    place_S = place_S.clamp(max=len(rows_SD) - 1)
    out_TD = rows_SD.new_empty(len(place_S) // k, width)
    tokens = max(1, CACHED // (k * width))
    for a in range(0, len(out_TD), tokens):
        b = min(a + tokens, len(out_TD))
        part = rows_SD.index_select(0, place_S[a * k : b * k]).view(b - a, k, width)
        if weight_TK is not None:
            part = part * weight_TK[a:b, :, None]
        out_TD[a:b] = part.sum(1, dtype=dtype)
    return out_TD
