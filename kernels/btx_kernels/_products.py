"""A matrix product into a given tensor, by the faster of the two libraries that torch has for it on a CPU.

torch computes float32 products with MKL, which on AMD's processors stays with AVX2: half the rate of those that have
AVX-512. oneDNN, which torch already uses for bfloat16 products, uses AVX-512 there for float32 too (its rounding error
was 1.6 times MKL's). torch offers it under a private name; where that is gone, or on another processor, MKL is used.
The rule looks at the processor and the sizes, never at a clock: the same machine rounds the same way in every run.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL = 2**24  # multiplications that MKL does in the 0.2 to 0.4 ms that oneDNN takes to prepare a size it has not met


def product(a_NM: Tensor, b_ML: Tensor, out_NL: Tensor) -> Tensor:
    """out = a b, returned as well."""
    plain = a_NM.dtype != torch.float32 or a_NM.device.type != "cpu" or a_NM.numel() * b_ML.shape[1] < SMALL
    onednn = None if plain or not torch.backends.mkldnn.enabled else _onednn()
    if onednn is None:
        return torch.mm(a_NM, b_ML, out=out_NL)
    return out_NL.copy_(onednn(a_NM, b_ML.T, None, "none", [], ""))


@cache
def _onednn() -> Any:
    """oneDNN's product a b^T where it is the faster one for float32, else None."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in _processor():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # another system than Linux
        return ""
