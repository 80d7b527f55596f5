"""Which experts the tokens of each domain go to: per layer, and over all layers.

Axes: T tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from btx.moe.hooks import Routed, router_labels
from btx.moe.routing import Routing


class RoutingShares:
    """Adds up, pass by pass, where the tokens of a domain went; `routed` is the rule at work on the model.

    Call it after each forward pass with a mask (T,) of the tokens that count: padding is routed too, and must not.
    """

    def __init__(self, model: Any, routed: Routed) -> None:
        self.routed, self.labels = routed, router_labels(model)
        self.loads: list[Tensor] = []  # choices by expert (E,), one a router
        self.entropies: list[float] = []  # sums over tokens, as a share of log E
        self.tokens = 0

    @torch.inference_mode()
    def __call__(self, mask_T: Tensor) -> None:
        """Count the last forward pass."""
        found = [_sums(layer, mask_T.to(layer.logits_TE.device)) for layer in self.routed.layers]
        if not self.tokens:
            self.loads, self.entropies = [torch.zeros_like(load) for load, _ in found], [0.0] * len(found)
        for n, (load_E, entropy) in enumerate(found):
            self.loads[n] += load_E
            self.entropies[n] += entropy
        self.tokens += int(mask_T.sum())

    def table(self) -> dict[str, Any]:
        """Load (share of token-choices) per router and expert, its mean over them, and the routers' entropy."""
        layers_LE = torch.stack([load / load.sum() for load in self.loads])
        return {
            "routers": self.labels,
            "layers": layers_LE.tolist(),
            "mean": layers_LE.mean(0).tolist(),
            "entropy": [entropy / self.tokens for entropy in self.entropies],
            "tokens": self.tokens,
        }


def _sums(layer: Routing, mask_T: Tensor) -> tuple[Tensor, float]:
    """Choices by expert (E,) float64, and the summed entropy of the tokens that count, as a share of log E."""
    logits_TE = layer.logits_TE[mask_T].float()
    experts = logits_TE.shape[-1]
    load_E = torch.bincount(layer.index_TK[mask_T].flatten(), minlength=experts).double().cpu()
    entropy = float(torch.special.entr(logits_TE.softmax(-1)).double().sum())
    return load_E, entropy / math.log(experts) if experts > 1 else float(len(logits_TE))
