"""Fits the router row of an expert added later, in closed form: ridge regression on each router's real inputs.

The row w of a layer minimises, over router inputs x of the new domain and of the old ones, both weighted equally,

    mean (w·x − y)² + λ |w|²,   y = (highest old logit) + margin   for a token of the new domain,
                                y = (k-th highest old logit) − margin   for one of an old domain,

so that the new expert ranks first on its own domain and is not selected elsewhere, as far as a linear map of x can
separate the two. Nothing is trained; the old rows stay. A changed layer changes the inputs of later ones, so the fit
is repeated on the model that has the first rows.

Axes: T tokens, E experts, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from btx.merge.router_init import RIDGE
from btx.moe.dialects import dialect_of, matrix_of
from btx.moe.hooks import find_routers

MARGIN = 1.0  # least margin, in logits; the standard deviation of the old logits where that is larger


@dataclass
class Normal:
    """The normal equations of one layer: sums of x xᵀ and of x y over tokens, in float64."""

    gram_DD: Tensor
    moment_D: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int) -> Normal:
        """Sums over no tokens."""
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))

    def add(self, x_TD: Tensor, y_T: Tensor) -> None:
        """Add router inputs and their target logits."""
        x_TD = x_TD.double()
        self.gram_DD += x_TD.T @ x_TD
        self.moment_D += x_TD.T @ y_T.double()
        self.tokens += len(x_TD)


def solve(sides: Iterable[Normal]) -> Tensor:
    """The router row (D,) in float32 that fits both sides; ValueError for a side without tokens."""
    used = list(sides)
    if not all(side.tokens for side in used):
        raise ValueError("there are no tokens of the new domain, or none of the old ones")
    gram = torch.stack([side.gram_DD / side.tokens for side in used]).sum(0)
    moment = torch.stack([side.moment_D / side.tokens for side in used]).sum(0)
    ridge = RIDGE * gram.diagonal().mean()
    row: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), moment)
    return row.float()


def targets(old_TE: Tensor, *, k: int, new: bool) -> Tensor:
    """Target logits (T,) of the new expert, from the old experts' logits."""
    margin = max(MARGIN, float(old_TE.std()))
    if new:
        return old_TE.amax(-1) + margin
    return old_TE.topk(min(k, old_TE.shape[-1]), -1).values[:, -1] - margin


@torch.inference_mode()
def fit_rows(model: Any, new: Iterable[Tensor], old: Iterable[Tensor], *, experts: int) -> list[Tensor]:
    """The new expert's row (D,) of every layer's router, first layer first.

    `new` and `old` are batches of token ids (B, S); `experts` is the number of old experts. The model may already have
    the new one, as its last.
    """
    routers = list(find_routers(model).values())
    dialects = [dialect_of(router) for router in routers]
    width = int(model.config.hidden_size)
    sums = {side: [Normal.empty(width) for _ in routers] for side in (True, False)}
    side = True

    def note(layer: int, module: Any, x_TD: Tensor) -> None:
        old_TE = torch.nn.functional.linear(x_TD, module.weight[:experts]).float()
        x_TD, old_TE = x_TD.cpu(), old_TE.cpu()
        sums[side][layer].add(x_TD, targets(old_TE, k=dialects[layer].top_k, new=side))

    handles = [
        matrix_of(router).register_forward_pre_hook(
            lambda module, args, layer=layer: note(layer, module, args[0].flatten(0, -2))
        )
        for layer, router in enumerate(routers)
    ]
    try:
        for side, batches in ((True, new), (False, old)):  # noqa: B007 - `note` reads it
            for ids in batches:
                model.base_model(input_ids=ids.to(model.device), use_cache=False)  # logits are not needed
    finally:
        for handle in handles:
            handle.remove()
    return [solve([sums[True][layer], sums[False][layer]]) for layer in range(len(routers))]
