"""Expert load: which experts the tokens of each domain are routed to, per layer and over all layers.

Axes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from btx.moe.hooks import Routed, router_labels
from btx.moe.routing import Routing


class RoutingShares:
    """Accumulates a domain's expert load over forward passes; `routed` is the routing rule installed on the model.

    Call it after each forward pass with a mask (T,) of the tokens to count: padding is routed too, but must not count.
    """

    def __init__(self, model: Any, routed: Routed) -> None:
        self.routed, self.labels = routed, router_labels(model)
        self.loads: list[Tensor] = []  # routing choices by expert (E,), one tensor per router
        self.entropies: list[float] = []  # sums over tokens, as a share of log E
        self.tokens = 0

    @torch.inference_mode()
    def __call__(self, mask_T: Tensor) -> None:
        """Count the last forward pass."""
        each = self.routed.each
        found = [_sums(layer, mask_T.to(layer.logits_TE.device), each) for layer in self.routed.layers]
        if not self.tokens:
            self.loads, self.entropies = [torch.zeros_like(load) for load, _ in found], [0.0] * len(found)
        for n, (load_E, entropy) in enumerate(found):
            self.loads[n] += load_E
            self.entropies[n] += entropy
        self.tokens += int(mask_T.sum())

    def table(self) -> dict[str, Any]:
        """Load (share of routing choices) per router and expert, its mean over routers, and each router's entropy.

        Where the models that were merged are mixtures, all experts of one are counted together.
        """
        layers_LE = torch.stack([load / load.sum() for load in self.loads])
        return {
            "routers": self.labels,
            "layers": layers_LE.tolist(),
            "mean": layers_LE.mean(0).tolist(),
            "entropy": [entropy / self.tokens for entropy in self.entropies],
            "tokens": self.tokens,
        }


def _sums(layer: Routing, mask_T: Tensor, each: int) -> tuple[Tensor, float]:
    """Routing choices by expert (E,), float64, and the summed router entropy of counted tokens, as a share of log E.

    Experts are counted `each` together.
    """
    logits_TE = layer.logits_TE[mask_T].float()
    experts = logits_TE.shape[-1]
    load_E = torch.bincount(layer.index_TK[mask_T].flatten(), minlength=experts).double().cpu()
    entropy = float(torch.special.entr(logits_TE.softmax(-1)).double().sum())
    return load_E.view(-1, each).sum(-1), entropy / math.log(experts) if experts > 1 else float(len(logits_TE))
