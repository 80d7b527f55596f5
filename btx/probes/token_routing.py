"""Which experts each token of a few held-out texts is routed to, layer by layer: to look at, not to average."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from btx.models.opened import ROUTING, Opened, Stock
from btx.moe.routing import Routing
from btx.probes.contract import Data, Found, Probe
from btx.recipe.fields import Count
from btx.recipe.settings import Settings


class TokenRoutingSettings(Settings):
    """The experts of every token of a few held-out texts."""

    documents: Count = Field(1, description="of each domain, from the first")
    tokens: Count = Field(160, description="of each document, from its beginning")


def measure(model: Opened, _reference: None, data: Data, settings: TokenRoutingSettings) -> Found:
    """A row per token: its id and, by layer, the expert with the largest gate weight; by domain how often that changes.

    A text is passed at once, so a token is routed as in any pass that has as much of it before.
    """
    assert isinstance(model, Stock)  # as its capabilities say
    assert model.routed
    rows: list[dict[str, Any]] = []
    numbers = {}
    for domain, documents in data.documents.items():
        changes, pairs = 0, 0
        for number, (ids, _) in enumerate(documents[: settings.documents]):
            seen = torch.from_numpy(ids[: settings.tokens])[None].to(model.device)
            model.log_probs(seen)
            best_LT = torch.stack([_best(layer, model.routed.each) for layer in model.routed.layers])
            changes += int((best_LT[:, 1:] != best_LT[:, :-1]).sum())
            pairs += best_LT[:, 1:].numel()
            rows += [
                {"domain": domain, "document": number, "id": token, "experts": experts}
                for token, experts in zip(seen[0].tolist(), best_LT.T.tolist(), strict=True)
            ]
        numbers[domain] = {"switches": changes / max(pairs, 1)}
    return Found(numbers, rows)


def _best(layer: Routing, each: int) -> Tensor:
    """The expert (T,) with the largest gate weight, or the model whose experts have it together."""
    index_TK, weight_TK = layer.index_TK // each, layer.weight_TK.float()
    weight_TN = weight_TK.new_zeros(len(index_TK), layer.logits_TE.shape[-1] // each)
    return weight_TN.scatter_add_(1, index_TK, weight_TK).argmax(-1)


PROBE = Probe(measure, settings=TokenRoutingSettings, needs=frozenset({ROUTING}))
