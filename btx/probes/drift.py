"""How far hidden states have moved from the seed's, layer by layer; drift is change, not yet damage.

Linear CKA, centred (arXiv 1905.00414): ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) in Frobenius norms, of the hidden states X and Y of
the two models over the same tokens. It does not see a rotation or a scale; the relative change ‖Y − X‖ / ‖X‖ does.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from btx.models.opened import HIDDEN_STATES, Opened, Stock
from btx.probes.bits_per_byte import windows
from btx.probes.contract import Data, Document, Found, Probe
from btx.recipe.fields import Count
from btx.recipe.settings import Settings


class DriftSettings(Settings):
    """Drift of the hidden states from the seed's."""

    tokens: Count = Field(1024, description="tokens of each domain that are looked at, at most")


def measure(model: Opened, seed: Opened, data: Data, settings: DriftSettings) -> Found:
    """CKA and change, mean over layers and of the last one, by domain; a row per domain and layer."""
    rows: list[dict[str, Any]] = []
    numbers = {}
    for domain, documents in data.documents.items():
        before, after = (_states(one, documents, data, settings.tokens) for one in (seed, model))
        alike = [cka(x, y) for x, y in zip(before, after, strict=True)]
        change = [float((y - x).norm() / x.norm()) for x, y in zip(before, after, strict=True)]
        numbers[domain] = {
            "cka": sum(alike) / len(alike), "cka_last": alike[-1], "change": sum(change) / len(change)
        }  # fmt: skip
        rows += [
            {"domain": domain, "layer": layer, "cka": one, "change": other}
            for layer, (one, other) in enumerate(zip(alike, change, strict=True))
        ]
    return Found(numbers, rows)


def _states(model: Opened, documents: list[Document], data: Data, most: int) -> list[Tensor]:
    """Hidden states (N, D) of the first tokens, before the first layer and after each, on the CPU in float64."""
    assert isinstance(model, Stock)  # as its capabilities say
    kept: list[list[Tensor]] = []
    for _, ids in sorted(windows(documents, data.length), key=lambda piece: piece[0]):
        ids_BS = torch.from_numpy(ids[None, :-1]).to(model.device)
        kept.append([hidden[0].cpu() for hidden in model.hidden_states(ids_BS)])
        most -= ids_BS.shape[1]
        if most <= 0:
            break
    return [torch.cat(layer).double() for layer in zip(*kept, strict=True)]


def cka(first_ND: Tensor, second_ND: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features over the same items; 1 for the same up to a rotation."""
    x, y = (one - one.mean(0) for one in (first_ND, second_ND))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


PROBE = Probe(measure, settings=DriftSettings, needs=frozenset({HIDDEN_STATES}), reference=True)
