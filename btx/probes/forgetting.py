"""Forgetting and its reverse: what the seed predicted right and the model does not, and the other way round.

Items are next tokens, predicted by the likeliest one, on every domain and on the seed's own text (`seed`), which is the
neutral one. Beside the shares stands the change of cross-entropy in nats per token. Of the items that change sides some
do so by chance: (1 − a₀)(1 − a₁)/(k − 1), with accuracies a₀ and a₁ and k possible answers (here the vocabulary), is
taken off both shares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from btx.models.opened import Opened
from btx.probes.contract import Data, Found, Probe
from btx.probes.passes import passes


def measure(model: Opened, seed: Opened, data: Data, _settings: Any) -> Found:
    """Numbers by domain; a row per document with its counts and nats."""
    rows: list[dict[str, Any]] = []
    numbers = {}
    for domain, documents in data.documents.items():
        counts = np.zeros((len(documents), 4))  # right in the seed, right in the model, forgotten, learned
        nats = np.zeros((len(documents), 2))  # of the seed, of the model
        choices = 0
        for where, targets, each in passes(
            [seed, model], documents, length=data.length, batch_tokens=data.batch_tokens
        ):
            counted = targets >= 0
            choices = each[0].shape[-1]
            before, after = ((found.argmax(-1) == targets) & counted for found in each)
            sides = [before, after, before & ~after, after & ~before]
            np.add.at(counts, where, np.stack([side.sum(1).cpu().numpy() for side in sides], axis=1))
            lost = [-found.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * counted for found in each]
            np.add.at(nats, where, np.stack([one.double().sum(1).cpu().numpy() for one in lost], axis=1))
        tokens = np.array([len(ids) - 1 for ids, _ in documents])
        numbers[domain] = _numbers(counts.sum(0) / tokens.sum(), nats.sum(0) / tokens.sum(), choices)
        names = ("right_before", "right_after", "forgotten", "learned")
        rows += [
            {"domain": domain, "document": n, "tokens": int(tokens[n]), **dict(zip(names, map(int, row), strict=True)),
             "nats_before": float(nats[n, 0]), "nats_after": float(nats[n, 1])}
            for n, row in enumerate(counts)
        ]  # fmt: skip
    return Found(numbers, rows)


def _numbers(shares: Any, nats: Any, choices: int) -> dict[str, float]:
    before, after, forgotten, learned = map(float, shares)
    chance = (1 - before) * (1 - after) / (choices - 1)
    return {
        "forgotten": forgotten - chance, "learned": learned - chance,
        "change_nats_per_token": float(nats[1] - nats[0]),
    }  # fmt: skip


PROBE = Probe(measure, reference=True)
