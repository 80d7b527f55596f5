"""KL divergence between the next-token distributions of the seed and a model: KL(seed ‖ model), in nats per token.

It shows change that bits per byte misses: a model may score as well on a text and still predict differently. It is
measured on the held-out documents, in the windows in which they are scored; both models see the same ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from btx.models.opened import Opened
from btx.probes.contract import Data, Document, Found, Probe
from btx.probes.passes import passes


def measure(model: Opened, seed: Opened, data: Data, _settings: Any) -> Found:
    """The mean per token of each domain, and a row per document with its sum and token count."""
    rows, numbers = [], {}
    for domain, documents in data.documents.items():
        sums = divergence(seed, model, documents, length=data.length, batch_tokens=data.batch_tokens)
        counts = [len(ids) - 1 for ids, _ in documents]
        numbers[domain] = {"nats_per_token": float(sum(sums) / sum(counts))}
        rows += [
            {"domain": domain, "document": n, "nats": nats, "tokens": count}
            for n, (nats, count) in enumerate(zip(sums.tolist(), counts, strict=True))
        ]
    return Found(numbers, rows)


def divergence(
    seed: Opened, model: Opened, documents: list[Document], *, length: int, batch_tokens: int
) -> NDArray[np.float64]:
    """KL(seed ‖ model) of each document (documents,), in nats, summed over its tokens, over the shared vocabulary."""
    total = np.zeros(len(documents))
    for numbers, targets, (p, q) in passes([seed, model], documents, length=length, batch_tokens=batch_tokens):
        rows_BS = (p.exp() * (p - q)).sum(-1).masked_fill(targets < 0, 0.0)
        np.add.at(total, numbers, rows_BS.double().sum(1).cpu().numpy())
    return total


PROBE = Probe(measure, reference=True)
