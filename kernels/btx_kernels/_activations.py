"""The activations of gated experts, by name: SiLU (SwiGLU, arXiv 2002.05202) and the tanh form of GELU (1606.08415)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NAMES = ("silu", "gelu_tanh")
_ATEN = torch.ops.aten


def activated(gate: Tensor, name: str) -> Tensor:
    """silu(x) = x σ(x), or gelu_tanh(x) = x σ(2 √(2/π) (x + 0.044715 x³)), which is 0.5 x (1 + tanh(...)).

    ValueError for another name.
    """
    if name == "silu":
        return functional.silu(gate)
    if name == "gelu_tanh":
        return functional.gelu(gate, approximate="tanh")
    raise _unknown(name)


def known(name: str) -> str:
    """The name of an activation that there is; ValueError for another one."""
    if name not in NAMES:
        raise _unknown(name)
    return name


def _unknown(name: str) -> ValueError:
    return ValueError(f"experts have no activation {name!r} here; known: {', '.join(NAMES)}")


def activate(gate: Tensor, name: str, out: Tensor) -> Tensor:
    """The same into a given tensor, which is returned."""
    if name == "gelu_tanh":
        made: Tensor = _ATEN.gelu.out(gate, approximate="tanh", out=out)
    else:
        made = _ATEN.silu.out(gate, out=out)
    return made


def gradient(grad: Tensor, gate: Tensor, name: str, out: Tensor) -> None:
    """The gradient of the activation's input into a given tensor, from that of its output."""
    if name == "gelu_tanh":
        _ATEN.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=out)
    else:
        _ATEN.silu_backward.grad_input(grad, gate, grad_input=out)
