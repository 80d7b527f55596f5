"""MegaBlocks' dropless block-sparse experts (arXiv 2211.15841), by the packages megablocks and stanford-stk themselves.

Their Triton kernels compute; this file makes them run on current torch and Triton. MegaBlocks refuses Triton 3.2 and
newer because stk's 16-bit block indices overflow there: the topology here is 32-bit. And it needs a compiled module,
`megablocks_ops`, of a few small operations: where that is missing, torch does them.

The rows of an expert are padded to blocks of 128, and so are the widths D and F, with zeros, which is exact. Gate and
up are one sparse matrix of width 2F, so their weights are used in place where D and F are multiples of 128; those of
down are transposed by a copy. stk's kernels count elements in 32 bits: more than 2^31 in one matrix are refused.
float32 products use TF32 on a GPU. Under Triton's interpreter (TRITON_INTERPRET=1) it runs on a CPU, slowly.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from btx_kernels._activations import activated, known

BLOCK = 128
TRITON = True  # on a CPU it runs only in the interpreter


def _inclusive_cumsum(x_BN: Tensor, dim: int, out_BN: Tensor) -> None:
    out_BN.copy_(x_BN.cumsum(dim))


def _exclusive_cumsum(x_BN: Tensor, dim: int, out_BN: Tensor) -> None:
    out_BN.copy_(x_BN.cumsum(dim) - x_BN)


def _histogram(x_N: Tensor, bins: int) -> Tensor:
    return torch.bincount(x_N.flatten(), minlength=bins)[:bins].int()


def _sort(x_N: Tensor, _end_bit: int, out_N: Tensor, place_N: Tensor) -> None:
    values, places = x_N.sort(stable=True)
    out_N.copy_(values)
    place_N.copy_(places)


def _indices(padded_bins_E: Tensor, block: int, rows: int, columns: int, out_N: Tensor) -> None:
    out_N.copy_(_columns(padded_bins_E // block, rows, columns).flatten())


def _replicate_forward(x_BE: Tensor, bins_E: Tensor, out_BN: Tensor) -> None:
    counts = bins_E.diff(prepend=bins_E.new_zeros(1))
    out_BN.copy_(x_BE.repeat_interleave(counts, dim=1, output_size=out_BN.shape[1]))


def _replicate_backward(grad_BN: Tensor, bins_E: Tensor, out_BE: Tensor) -> None:
    places = torch.arange(grad_BN.shape[1], device=grad_BN.device)
    owner_N = torch.searchsorted(bins_E.long(), places, right=True)
    out_BE.zero_().index_add_(1, owner_N, grad_BN)


def _columns(ends_E: Tensor, rows: int, columns: int) -> Tensor:
    """Block columns of each block row, when expert e has the block rows up to `ends_E[e]` and `columns` columns."""
    row_R = torch.arange(rows, device=ends_E.device)
    expert_R = torch.searchsorted(ends_E.long(), row_R, right=True)
    return expert_R[:, None] * columns + torch.arange(columns, device=ends_E.device)


def _in_torch() -> ModuleType:
    """The compiled module's operations, under their names and calling convention."""
    module = ModuleType("megablocks_ops")
    for operation in (
        _inclusive_cumsum, _exclusive_cumsum, _histogram, _sort, _indices, _replicate_forward, _replicate_backward,
    ):  # fmt: skip
        setattr(module, operation.__name__[1:], operation)
    return module


try:
    import megablocks_ops  # noqa: F401
except ImportError:
    sys.modules["megablocks_ops"] = _in_torch()
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of grouped_gemm, which is not used here
        import stk
        import stk.ops
        from megablocks import ops
        from megablocks.backend import kernels
except ImportError as error:
    raise ImportError(
        f"the kernel sparse needs Triton and the packages megablocks and stanford-stk ({error}). "
        "`make megablocks` installs them."
    ) from error

for _kernel in vars(kernels).values():
    if not torch.cuda.is_available() and len(getattr(_kernel, "configs", ())) > 1:
        _kernel.configs = _kernel.configs[:1]  # an interpreter has nothing to tune, and no device to time on


def experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, activation: str = "silu"
) -> Tensor:  # fmt: skip
    """out_t = Σ_k weight_tk · down_e (act(gate_e x_t) ⊙ (up_e x_t)), e = index_tk; see `btx_kernels.reference`.

    float32, bfloat16 or float16. An index of E stands for an expert elsewhere and adds nothing.
    """
    if x_TD.dtype == torch.bfloat16 and not x_TD.is_cuda:  # Triton's interpreter would multiply its raw bits
        return experts(x_TD.float(), gate_up_EFD.float(), down_EDF.float(), index_TK, weight_TK, activation).bfloat16()
    with torch.cuda.device_of(x_TD):
        return _experts(x_TD, gate_up_EFD, down_EDF, index_TK, weight_TK, known(activation))


def _experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor, activation: str
) -> Tensor:
    tokens, width = x_TD.shape
    count, _, half = down_EDF.shape
    away_TK = index_TK >= count
    index_S = index_TK.masked_fill(away_TK, 0).flatten().int()
    weight_S = weight_TK.masked_fill(away_TK, 0).flatten()
    more, more_half = -width % BLOCK, -half % BLOCK
    up_ND = _padded(gate_up_EFD.unflatten(1, (2, half)), more_half, more).flatten(0, 2)
    down_ND = _padded(down_EDF.transpose(1, 2), more_half, more).flatten(0, 1)
    if not tokens:
        return x_TD + 0 * (up_ND.sum() + down_ND.sum() + weight_S.sum())
    with torch.no_grad():
        bits = max(1, (count - 1).bit_length())
        bin_S, choice_S = ops.sort(index_S, bits)
        count_E = ops.histogram(index_S, count)
        bins_E = ops.inclusive_cumsum(count_E, 0).view(count)
        padded_E = ops.inclusive_cumsum(ops.round_up(count_E, BLOCK), 0).view(count)
        columns = (half + more_half) // BLOCK
        whole, half_of_it = (_topology(padded_E // BLOCK, n, x_TD.dtype) for n in (2 * columns, columns))
    _refuse_beyond_32_bits(whole.size()[0] * 2 * (half + more_half), up_ND.numel(), index_TK.numel() * (width + more))
    places = (choice_S, bin_S, bins_E, padded_E)
    x_SD = ops.padded_gather(_padded(x_TD, 0, more), *places, index_TK.shape[1])
    hidden = stk.ops.sdd(x_SD, up_ND.t(), whole).data.view(-1, 2, columns, BLOCK, BLOCK)
    act = activated(hidden[:, 0], activation) * hidden[:, 1]
    out_SD = stk.ops.dsd(_with_data(half_of_it, act.reshape(-1, BLOCK, BLOCK)), down_ND)
    out_TD: Tensor = ops.padded_scatter(out_SD, *places[:2], weight_S, *places[2:], index_TK.shape[1])
    return out_TD[:, :width].to(x_TD.dtype)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """The tensor with that many rows and columns of zeros appended, contiguous; not copied where it already is."""
    return (functional.pad(x, (0, columns, 0, rows)) if rows or columns else x).contiguous()


def _refuse_beyond_32_bits(*elements: int) -> None:
    if max(elements) >= 2**31:
        raise ValueError(
            f"the kernel sparse cannot address {max(elements):,} elements of one matrix with the 32 bits of stk's "
            "kernels. Use fewer tokens per pass (run.micro_batch) or another kernel."
        )


def _topology(ends_E: Tensor, columns: int, dtype: torch.dtype) -> stk.Matrix:
    """The non-zero blocks of the (rows, E · columns) matrix of hidden values, with 32-bit indices."""
    rows, device = int(ends_E[-1]), ends_E.device
    column_N = _columns(ends_E, rows, columns).flatten()
    row_N = torch.arange(rows, device=device).repeat_interleave(columns)
    by_column_N = column_N.argsort(stable=True)
    per_column = torch.bincount(column_N, minlength=len(ends_E) * columns)
    offsets_t = functional.pad(per_column.cumsum(0), (1, 0))
    data = torch.empty(len(row_N), BLOCK, BLOCK, dtype=dtype, device="meta")
    offsets = torch.arange(0, len(row_N) + 1, columns, device=device)
    parts = (row_N, column_N, offsets, row_N[by_column_N], offsets_t, by_column_N)
    return stk.Matrix((rows * BLOCK, len(ends_E) * columns * BLOCK), data, *(part.int() for part in parts))


def _with_data(topology: stk.Matrix, data: Tensor) -> stk.Matrix:
    t = topology
    return stk.Matrix(
        t.size(), data, t.row_indices, t.column_indices, t.offsets, t.column_indices_t, t.offsets_t, t.block_offsets_t
    )
