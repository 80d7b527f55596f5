"""Which experts the tokens of each domain go to: per layer, and over all layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from btx.probes.bits_per_byte import Document, windows
from btx.routed import Routed, router_labels
from btx.routing import statistics


@torch.inference_mode()
def routing_shares(model: Any, routed: Routed, documents: list[Document], *, length: int) -> dict[str, Any]:
    """Load (share of token-choices) per layer with a router and expert, its mean over them, and the routers' entropy.

    `routed` is the rule at work on `model`. Windows of the greatest length only, so that no padding is counted.
    """
    pieces = [ids[:-1] for _, ids in windows(documents, length)]
    full = [ids for ids in pieces if len(ids) == len(pieces[0])]
    weight, loads, entropies = 0, None, None
    for start in range(0, len(full), 32):
        ids = torch.from_numpy(np.stack(full[start : start + 32])).to(model.device)
        model(input_ids=ids, use_cache=False)
        layers = statistics(routed.layers)
        load = ids.numel() * np.array([layer.load for layer in layers])
        entropy = ids.numel() * np.array([layer.entropy_share for layer in layers])
        loads = load if loads is None else loads + load
        entropies = entropy if entropies is None else entropies + entropy
        weight += ids.numel()
    assert loads is not None
    assert entropies is not None
    return {
        "routers": router_labels(model),
        "layers": (loads / weight).tolist(),
        "mean": (loads.mean(0) / weight).tolist(),
        "entropy": (entropies / weight).tolist(),
        "tokens": weight,
    }
