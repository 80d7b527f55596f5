"""Reinitialises a share of an expert's hidden units, as in Drop-Upcycling (Nakamura et al., arXiv 2502.19261, sec. 3).

For each expert and layer a share r of the F hidden units is chosen at random: the same rows of the gate and up
projections and columns of the down projection. Their weights are drawn from a normal distribution with the mean and the
standard deviation of the weights that they replace, matrix by matrix. The other units keep their bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


def chosen(width: int, share: float, key: str) -> Tensor:
    """Mask (F,) of the hidden units to reinitialise, with ⌊r F⌋ true."""
    order = _generator(key).permutation(width)[: int(share * width)]
    mask = torch.zeros(width, dtype=torch.bool)
    mask[torch.from_numpy(order)] = True
    return mask


def renewed(
    read: Callable[[], Iterable[Tensor]], columns: int, units_F: Tensor, *, down: bool, key: str
) -> Iterator[Tensor]:
    """A matrix with `columns` columns, in flat row-major blocks in fp32, its chosen units reinitialised.

    `read` gives the blocks, and is called twice; `down` means that columns are units, not rows. The draws depend on
    `key` and the matrix, not on how it is cut into blocks.
    """
    count, total, squares = 0, 0.0, 0.0
    for block, mask in _masked(read(), columns, units_F, down):
        values = block[mask].to(torch.float64)
        count, total, squares = count + len(values), total + float(values.sum()), squares + float(values @ values)
    mean = total / max(count, 1)
    deviation = max(squares / max(count, 1) - mean * mean, 0.0) ** 0.5
    random = _generator(key)
    for block, mask in _masked(read(), columns, units_F, down):
        made = block.to(torch.float32, copy=True)
        made[mask] = torch.from_numpy(mean + deviation * random.standard_normal(int(mask.sum()))).to(torch.float32)
        yield made


def _masked(blocks: Iterable[Tensor], columns: int, units_F: Tensor, down: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block, flat, with the mask of its elements that belong to chosen units."""
    start = 0
    for block in blocks:
        flat = block.flatten()
        at = torch.arange(start, start + len(flat))
        yield flat, units_F[at % columns if down else at // columns]
        start += len(flat)


def _generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])))
