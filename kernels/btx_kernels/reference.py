"""A plain loop over experts: the reference that every other kernel is tested against.

Runs on any device and dtype, float64 included; gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from btx_kernels._activations import activated


def experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, activation: str = "silu"
) -> Tensor:  # fmt: skip
    """out_t = Σ_k weight_tk · down_e (act(gate_e x_t) ⊙ (up_e x_t)), e = index_tk, act as `_activations.activated`.

    `gate_up_EFD` is (E, 2F, D): the gate's rows, then the up projection's. The sum is taken in the dtype that the
    weights and activations promote to, and returned in that of `x_TD`. An index of E stands for an expert elsewhere
    (expert parallelism) and adds nothing.
    """
    out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, weight_TK.dtype))
    for e in range(gate_up_EFD.shape[0]):
        token, choice = torch.where(index_TK == e)
        gate, up = functional.linear(x_TD[token], gate_up_EFD[e]).chunk(2, dim=-1)
        hidden = functional.linear(activated(gate, activation) * up, down_EDF[e])
        out_TD = out_TD.index_add(0, token, (hidden * weight_TK[token, choice, None]).to(out_TD.dtype))
    return out_TD.to(x_TD.dtype)
