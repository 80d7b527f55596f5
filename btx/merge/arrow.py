"""Arrow (arXiv 2405.11157): an expert's row of a router from its weights, without any data or training.

It is the input direction that the expert's change answers to most: the first right singular vector of ΔW, its gate and
up projections less the seed's, one upon the other. The paper has it of LoRA experts, where ΔW is B A.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from btx.checkpoints.reader import Checkpoint
from btx.models.family import GATE, UP


def directions(seed: Checkpoint, other: Checkpoint, layers: Sequence[int]) -> list[Tensor]:
    """Unit vectors (D,) in float32, one for each layer; zeros where nothing was changed. Their sign is arbitrary."""
    return [
        _first(torch.cat([_change(seed, other, f"model.layers.{n}.{kind}") for kind in (GATE, UP)])) for n in layers
    ]


def _change(seed: Checkpoint, other: Checkpoint, name: str) -> Tensor:
    shape = seed.entries[name].shape
    before, after = (one.flat(name, 0, shape[0] * shape[1]).float() for one in (seed, other))
    return (after - before).view(shape)


def _first(change_FD: Tensor) -> Tensor:
    """The first right singular vector (D,) of a matrix; zeros for zeros."""
    if not change_FD.any():
        return torch.zeros(change_FD.shape[1])
    change_FD = change_FD.double()
    # By torch's products, whose threads the merge sets to one: how a sum is split decides its last digits.
    by_torch = LinearOperator(
        change_FD.shape, dtype=np.float64, matvec=lambda v: (change_FD @ torch.from_numpy(v.ravel())).numpy(),
        rmatvec=lambda u: (torch.from_numpy(u.ravel()) @ change_FD).numpy(),
    )  # fmt: skip
    start = np.ones(min(change_FD.shape))  # fixed, so that the same weights give the same row
    *_, found_1D = svds(by_torch, k=1, v0=start, return_singular_vectors="vh")
    return torch.from_numpy(found_1D[0].copy()).float()
