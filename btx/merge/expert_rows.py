"""The tensors that hold the experts of a layer, as their MoE class publishes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product

import torch

from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.writer import TensorSpec
from btx.merge.layout import Experts
from btx.models.family import DOWN, Family


def expert_rows(
    family: Family, experts: Experts, models: list[Checkpoint], prefix: str, kind: str, shape: tuple[int, ...],
    dtype: torch.dtype,
) -> list[TensorSpec]:  # fmt: skip
    """MoE tensors made of one dense feed-forward tensor: one per expert, or one for all experts of a layer."""
    axis = 1 if kind == DOWN else 0
    one = tuple(experts.expert_width if a == axis else s for a, s in enumerate(shape))
    published = family.expert[kind]

    def pieces(numbers: Iterable[int], kinds: Iterable[str]) -> Iterator[torch.Tensor]:
        for e, k in product(numbers, kinds):
            for piece in experts.pieces(models, e, prefix + k):
                yield piece.to(dtype)

    if not family.stacked:
        return [
            TensorSpec(prefix + published.format(e=e), dtype, one, partial(pieces, [e], [kind]))
            for e in range(experts.count)
        ]
    together = [k for k in family.expert if family.expert[k] == published]  # gate and up lie in one tensor
    if kind != together[0]:
        return []
    stacked = (experts.count, len(together) * one[0], one[1])
    return [TensorSpec(prefix + published, dtype, stacked, partial(pieces, range(experts.count), together))]
