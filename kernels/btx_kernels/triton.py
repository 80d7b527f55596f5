"""Our own Triton kernels for Hopper and Ampere: grouped products with everything around them fused in.

Forward: up (rows gathered by token, gate and up side by side, the gated activation fused in), down (weighted rows
scattered to their choices), and their sum. Backward: the gradient of the activations with theirs fused in, those of the
weights, that of the input, and its sum. All but the sums and the weights' gradients are persistent: a few programs per
multiprocessor walk all tiles of all experts.

Between the passes only the pre-activations (S, 2F) are kept, where a dense layer under autograd keeps four times F per
token. Only the first call at a new width synchronises with the device, to tune the block sizes; sums then have a fixed
order, and no atomic is used. Another process may tune to other sizes, and so round differently.

float32 (TF32 if torch allows it), bfloat16 or float16. Under Triton's interpreter (TRITON_INTERPRET=1) it runs on a
CPU, slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from btx_kernels._activations import known
from btx_kernels._order import Order, order

try:
    from btx_kernels import _triton_kernels as launch
except ImportError as error:
    raise ImportError("the kernel triton needs the package triton: `pip install triton` (Linux).") from error

TRITON = True  # on a CPU it runs only in the interpreter


def experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, activation: str = "silu"
) -> Tensor:  # fmt: skip
    """out_t = Σ_k weight_tk · down_e (act(gate_e x_t) ⊙ (up_e x_t)), e = index_tk; see `btx_kernels.reference`.

    An index of E stands for an expert elsewhere and adds nothing. TypeError for float64, which tensor cores lack.
    """
    if x_TD.dtype == torch.float64:
        raise TypeError(
            "the kernel triton computes in float32, bfloat16 or float16; for float64 use reference or sorted"
        )
    tensors = (x_TD.contiguous(), gate_up_EFD.contiguous(), down_EDF.contiguous(), index_TK, weight_TK)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    with torch.cuda.device_of(x_TD):
        out: Tensor = _Fused.apply(*tensors, keep, known(activation) == "gelu_tanh")
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, keep: bool,
        gelu: bool,
    ) -> Tensor:  # fmt: skip
        (tokens, width), (count, _, half) = x_TD.shape, down_EDF.shape
        by_expert, index_TK, weight_TK = order(index_TK, count), index_TK.contiguous(), weight_TK.contiguous()
        choices = index_TK.numel()
        hidden_SF = x_TD.new_empty(choices if keep else 0, 2 * half)
        act_SF, out_SD = x_TD.new_empty(choices, half), x_TD.new_empty(choices, width)
        if tokens:
            launch.up[_grid(x_TD)](
                x_TD, gate_up_EFD, hidden_SF, act_SF, by_expert.choice_S, by_expert.ends_E, count, width, half,
                K=index_TK.shape[1], KEEP=keep, GELU=gelu, **_how(x_TD),
            )  # fmt: skip
            _rows_out(act_SF, down_EDF, out_SD, by_expert, weight_TK, transposed=True)
        ctx.save_for_backward(x_TD, gate_up_EFD, down_EDF, index_TK, weight_TK, hidden_SF, *by_expert)
        ctx.gelu = gelu
        return _summed(out_SD, index_TK, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_EFD, down_EDF, index_TK, weight_TK, hidden_SF, *sorted_S = ctx.saved_tensors  # to be read once
        by_expert, grad_TD = Order(*sorted_S), grad_TD.contiguous()
        (tokens, width), (count, _, half) = x_TD.shape, down_EDF.shape
        wants_x, wants_up, wants_down = ctx.needs_input_grad[:3]
        if not tokens:
            nothing = (torch.zeros_like(t) for t in (x_TD, gate_up_EFD, down_EDF))
            return *nothing, None, weight_TK, None, None
        grad_hidden_SF, act_SF = torch.empty_like(hidden_SF), x_TD.new_empty(len(hidden_SF), half)
        dots = torch.zeros(len(hidden_SF), _blocks(half, launch.COLUMNS), dtype=torch.float32, device=x_TD.device)
        places, k = (by_expert.choice_S, by_expert.ends_E), index_TK.shape[1]
        launch.act_grad[_grid(x_TD)](
            grad_TD, down_EDF, hidden_SF, weight_TK, grad_hidden_SF, act_SF, dots, *places, count, width, half,
            K=k, GELU=ctx.gelu, **_how(x_TD),
        )  # fmt: skip
        grad_weight_S = weight_TK.new_empty(index_TK.numel())
        grad_weight_S[by_expert.choice_S] = dots.sum(1).to(weight_TK.dtype)
        grad_x_TD = grad_up_EFD = grad_down_EDF = None
        if wants_down:
            grad_down_EDF = _weights_grad(grad_TD, act_SF, torch.empty_like(down_EDF), by_expert, k, gather_p=True)
        if wants_up:
            grad_up_EFD = _weights_grad(grad_hidden_SF, x_TD, torch.empty_like(gate_up_EFD), by_expert, k)
        if wants_x:
            grad_SD = x_TD.new_empty(len(hidden_SF), width)
            _rows_out(grad_hidden_SF, gate_up_EFD, grad_SD, by_expert)
            grad_x_TD = _summed(grad_SD, index_TK, count)
        return grad_x_TD, grad_up_EFD, grad_down_EDF, None, grad_weight_S.view_as(weight_TK), None, None


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def _how(x_TD: Tensor) -> dict[str, Any]:
    """Precision of products: float32 in TF32 where torch allows it; an interpreter needs bfloat16 widened first."""
    fast = x_TD.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    return {"PRECISION": "tf32" if fast else "ieee", "WIDE": launch.INTERPRETED}


def _grid(x_TD: Tensor) -> Callable[[dict[str, int]], tuple[int]]:
    """One program per multiprocessor, or more where tiles are small; each walks its share of the tiles."""
    if not x_TD.is_cuda:
        return lambda _block: (3,)
    count = torch.cuda.get_device_properties(x_TD.device).multi_processor_count
    return lambda block: (count * max(1, 128 * 128 // (block["BM"] * block["BN"])),)


def _rows_out(
    a: Tensor, weight: Tensor, out: Tensor, by: Order, scale: Tensor | None = None, *, transposed: bool = False
) -> None:
    """out[choice] = scale · a W[e], W[e] being weight[e] or its transpose."""
    depth, columns = a.shape[1], out.shape[1]
    strides = (1, depth) if transposed else (columns, 1)
    launch.out[_grid(a)](
        a, weight, out, a if scale is None else scale, by.choice_S, by.ends_E, len(weight), depth, columns, *strides,
        SCALED=scale is not None, **_how(a),
    )  # fmt: skip


def _weights_grad(p: Tensor, q: Tensor, out: Tensor, by: Order, k: int, *, gather_p: bool = False) -> Tensor:
    """out[e] = P^T Q over the rows of each expert; `p` or `q`, the one by token, is gathered."""
    lines, columns = out.shape[1:]

    def grid(block: dict[str, int]) -> tuple[int, int]:
        return _blocks(lines, block["BM"]) * _blocks(columns, block["BN"]), len(out)

    launch.weight_grad[grid](
        p, q, out, by.choice_S, by.ends_E, lines, columns, K=k, GATHER_P=gather_p, GATHER_Q=not gather_p, **_how(p)
    )
    return out


def _summed(parts_SD: Tensor, index_TK: Tensor, count: int) -> Tensor:
    """Σ_k of the choices' rows."""
    (tokens, k), width = index_TK.shape, parts_SD.shape[1]
    out_TD = parts_SD.new_empty(tokens, width)
    if tokens:
        launch.sum_choices[(tokens, _blocks(width, 1024))](parts_SD, index_TK, out_TD, count, width, K=k, BLOCK=1024)
    return out_TD
