"""The Triton kernels behind `btx_kernels.triton`.

Axes: S choices sorted by expert, E experts, D hidden width, F feed-forward width, K choices per token; tiles have BM
rows, BN columns and depth BK. `choice` (S,) is the choice at each sorted place and `ends` (E,) where each expert's
places end, both 64-bit. The first three are persistent: a program walks every `num_programs`-th tile of all experts.

Registers are scarce in the epilogues: rows of a tile are contiguous, so their offsets are 32-bit from a 64-bit start,
and `act_grad` ends with a quarter of its columns at a time (for sm_90, 2,016 bytes of spills became 80).
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COLUMNS = 32 if INTERPRETED else 128  # per tile of activation gradients: `dots` has one column for each such tile


def _tuned(key: list[str], *shapes: tuple[int, int, int, int, int]) -> Any:
    """Autotuning over (rows, columns, depth, warps, stages); an interpreter takes small blocks and times nothing.

    The choice is kept in Triton's cache, so a run that is killed and resumed rounds as it did before.
    """
    if INTERPRETED:
        shapes = ((16, 32, 16, 1, 1),)
    configs = [
        triton.Config({"BM": m, "BN": n, "BK": k, "GROUP": 8}, num_warps=w, num_stages=s) for m, n, k, w, s in shapes
    ]
    return triton.autotune(configs=configs, key=key, cache_results=not INTERPRETED)


@triton.jit
def _place(local, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile `local` of an expert by groups of row tiles, so that neighbours share rows and weights in the L2 cache."""
    group = local // (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = local % (GROUP * column_tiles)
    return group * GROUP + within % size, within // size


@triton.jit
def _product(acc, a, a_rows, a_live, b, b_columns, b_live, DEPTH, stride_k, stride_n,
             BK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """acc += A B with rows of A anywhere, A's depth contiguous, and B at any strides."""
    for k in range(0, DEPTH, BK):
        depth = k + tl.arange(0, BK)
        inside = depth < DEPTH
        a_tile = tl.load(
            a + a_rows[:, None] * DEPTH + depth[None, :], mask=a_live[:, None] & inside[None, :], other=0.0
        )
        b_at = depth[:, None].to(tl.int64) * stride_k + b_columns[None, :] * stride_n
        b_tile = tl.load(b + b_at, mask=inside[:, None] & b_live[None, :], other=0.0)
        if WIDE:
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _activated(x, GELU: tl.constexpr):
    """The activation of a tile and its derivative; formulas as in `_activations`."""
    if GELU:
        square = x * x
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        value = x * share
        slope = share + value * (1 - share) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        share = tl.sigmoid(x)
        value = x * share
        slope = share + value * (1 - share)
    return value, slope


@_tuned(["D", "F"], (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3),
        (64, 64, 64, 4, 4), (128, 128, 32, 8, 4))  # fmt: skip
@triton.jit
def up(x, weight, hidden, act, choice, ends, E, D, F, K: tl.constexpr, KEEP: tl.constexpr, GELU: tl.constexpr,
        PRECISION: tl.constexpr, WIDE: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """hidden = x[token] W_gate_up[e]^T where it is kept, act = activated gate · up, for each expert's rows in turn."""
    tile, first, start = tl.program_id(0), 0, tl.load(ends) * 0
    column_tiles = tl.cdiv(F, BN)
    for e in range(E):
        end = tl.load(ends + e)
        row_tiles = tl.cdiv(end - start, BM).to(tl.int32)
        while tile < first + row_tiles * column_tiles:
            m, n = _place(tile - first, row_tiles, column_tiles, GROUP)
            row = start + m * BM + tl.arange(0, BM)
            column = n * BN + tl.arange(0, BN)
            live, inside = row < end, column < F
            token = tl.load(choice + row, mask=live, other=0) // K
            gates = weight + tl.cast(e, tl.int64) * 2 * F * D + column[None, :] * D
            gate = tl.zeros((BM, BN), tl.float32)
            up = tl.zeros((BM, BN), tl.float32)
            for k in range(0, D, BK):
                depth = k + tl.arange(0, BK)
                deep = depth < D
                x_tile = tl.load(x + token[:, None] * D + depth[None, :], mask=live[:, None] & deep[None, :], other=0.0)
                g_tile = tl.load(gates + depth[:, None], mask=deep[:, None] & inside[None, :], other=0.0)
                u_tile = tl.load(gates + F * D + depth[:, None], mask=deep[:, None] & inside[None, :], other=0.0)
                if WIDE:
                    x_tile, g_tile, u_tile = x_tile.to(tl.float32), g_tile.to(tl.float32), u_tile.to(tl.float32)
                gate = tl.dot(x_tile, g_tile, gate, input_precision=PRECISION)
                up = tl.dot(x_tile, u_tile, up, input_precision=PRECISION)
            top = start + m * BM  # rows of a tile lie together: one 64-bit start, offsets of 32 bits
            lane = tl.arange(0, BM)
            mask = live[:, None] & inside[None, :]
            if KEEP:
                at = hidden + top * 2 * F + lane[:, None] * (2 * F) + column[None, :]
                tl.store(at, gate.to(hidden.dtype.element_ty), mask=mask)
                tl.store(at + F, up.to(hidden.dtype.element_ty), mask=mask)
            value = _activated(gate, GELU)[0] * up
            tl.store(act + top * F + lane[:, None] * F + column[None, :], value.to(act.dtype.element_ty), mask=mask)
            tile += tl.num_programs(0)
        first += row_tiles * column_tiles
        start = end


@_tuned(["DEPTH", "N"], (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4),
        (128, 128, 32, 4, 4))  # fmt: skip
@triton.jit
def out(a, weight, out, scale, choice, ends, E, DEPTH, N, stride_k, stride_n, SCALED: tl.constexpr,
         PRECISION: tl.constexpr, WIDE: tl.constexpr,
         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """out[choice] = scale[choice] · (a W[e]) for the rows of every expert in turn; each choice is written once."""
    tile, first, start = tl.program_id(0), 0, tl.load(ends) * 0
    column_tiles = tl.cdiv(N, BN)
    for e in range(E):
        end = tl.load(ends + e)
        row_tiles = tl.cdiv(end - start, BM).to(tl.int32)
        while tile < first + row_tiles * column_tiles:
            m, n = _place(tile - first, row_tiles, column_tiles, GROUP)
            row = start + m * BM + tl.arange(0, BM)
            column = n * BN + tl.arange(0, BN)
            live, inside = row < end, column < N
            b = weight + tl.cast(e, tl.int64) * DEPTH * N
            acc = _product(tl.zeros((BM, BN), tl.float32), a, row, live, b, column, inside, DEPTH, stride_k, stride_n,
                           BK, PRECISION, WIDE)  # fmt: skip
            slot = tl.load(choice + row, mask=live, other=0)
            if SCALED:
                acc *= tl.load(scale + slot, mask=live, other=0.0).to(tl.float32)[:, None]
            mask = live[:, None] & inside[None, :]
            tl.store(out + slot[:, None] * N + column[None, :], acc.to(out.dtype.element_ty), mask=mask)
            tile += tl.num_programs(0)
        first += row_tiles * column_tiles
        start = end


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and right columns of a tile: an end that works on them in turn needs fewer registers."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _gated_grad(acc, by, hidden, grad_hidden, scaled_act, live, begin, F, GELU: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """What `act_grad` does with BN columns of its product; returns their part of the sums by row."""
    column = begin + tl.arange(0, BN)
    lane = tl.arange(0, BM)
    mask = live[:, None] & (column < F)[None, :]
    at = lane[:, None] * (2 * F) + column[None, :]
    gate = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden + F + at, mask=mask, other=0.0).to(tl.float32)
    activated, slope = _activated(gate, GELU)
    value = activated * up
    dot = tl.sum(acc * value, 1)
    kind = grad_hidden.dtype.element_ty
    tl.store(scaled_act + lane[:, None] * F + column[None, :], (value * by[:, None]).to(kind), mask=mask)
    acc *= by[:, None]
    tl.store(grad_hidden + F + at, (acc * activated).to(kind), mask=mask)
    tl.store(grad_hidden + at, (acc * up * slope).to(kind), mask=mask)
    return dot


@_tuned(["D", "F"], (128, COLUMNS, 64, 8, 3), (64, COLUMNS, 64, 4, 4), (128, COLUMNS, 32, 8, 4),
        (64, COLUMNS, 64, 8, 3))  # fmt: skip
@triton.jit
def act_grad(grad, weight, hidden, scale, grad_hidden, scaled_act, dots, choice, ends, E, D, F, K: tl.constexpr,
              GELU: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Gradient of the pre-activations; the activations again, weighted; Σ activation · gradient per row and tile."""
    tile, first, start = tl.program_id(0), 0, tl.load(ends) * 0
    column_tiles = tl.cdiv(F, BN)
    for e in range(E):
        end = tl.load(ends + e)
        row_tiles = tl.cdiv(end - start, BM).to(tl.int32)
        while tile < first + row_tiles * column_tiles:
            m, n = _place(tile - first, row_tiles, column_tiles, GROUP)
            row = start + m * BM + tl.arange(0, BM)
            column = n * BN + tl.arange(0, BN)
            live, inside = row < end, column < F
            slot = tl.load(choice + row, mask=live, other=0)
            b = weight + tl.cast(e, tl.int64) * D * F
            acc = _product(tl.zeros((BM, BN), tl.float32), grad, slot // K, live, b, column, inside, D, F, 1,
                           BK, PRECISION, WIDE)  # fmt: skip
            by = tl.load(scale + slot, mask=live, other=0.0).to(tl.float32)
            top = start + m * BM
            rows = (hidden + top * 2 * F, grad_hidden + top * 2 * F, scaled_act + top * F, live)
            left, right = _halves(acc, BM, BN)
            first_part, second_part = _halves(left, BM, BN // 2)
            third_part, fourth_part = _halves(right, BM, BN // 2)
            dot = _gated_grad(first_part, by, *rows, n * BN, F, GELU, BM, BN // 4)
            dot += _gated_grad(second_part, by, *rows, n * BN + BN // 4, F, GELU, BM, BN // 4)
            dot += _gated_grad(third_part, by, *rows, n * BN + BN // 2, F, GELU, BM, BN // 4)
            dot += _gated_grad(fourth_part, by, *rows, n * BN + 3 * BN // 4, F, GELU, BM, BN // 4)
            tl.store(dots + row * column_tiles + n, dot, mask=live)
            tile += tl.num_programs(0)
        first += row_tiles * column_tiles
        start = end


@_tuned(["M", "N"], (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 32, 4, 4), (64, 128, 64, 4, 4))
@triton.jit
def weight_grad(p, q, out, choice, ends, M, N, K: tl.constexpr, GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr,
                 PRECISION: tl.constexpr, WIDE: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """out[e] = P^T Q over the rows of expert e, one of the two gathered by token; zeros for an expert without rows."""
    e = tl.program_id(1)
    m, n = _place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    start = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    line, column = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    lined, inside = line < M, column < N
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, (end - start).to(tl.int32), BK):
        row = start + at + tl.arange(0, BK)
        live = row < end
        token = tl.load(choice + row, mask=live, other=0) // K
        p_row = token if GATHER_P else row
        q_row = token if GATHER_Q else row
        p_tile = tl.load(p + p_row[:, None] * M + line[None, :], mask=live[:, None] & lined[None, :], other=0.0)
        q_tile = tl.load(q + q_row[:, None] * N + column[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if WIDE:
            p_tile, q_tile = p_tile.to(tl.float32), q_tile.to(tl.float32)
        acc = tl.dot(tl.trans(p_tile), q_tile, acc, input_precision=PRECISION)
    mask = lined[:, None] & inside[None, :]
    at = tl.cast(e, tl.int64) * M * N + line[:, None] * N + column[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_choices(parts, index, out, E, D, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = Σ_k parts[t, k] over the choices whose expert is here."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        width = tl.where(tl.load(index + token * K + k) < E, D, 0)
        part = tl.load(parts + (token * K + k) * D + column, mask=column < width, other=0.0)
        acc += part.to(tl.float32)
    tl.store(out + token * D + column, acc.to(out.dtype.element_ty), mask=column < D)
