"""KL divergence between the next-token distributions of the seed and a model: KL(seed ‖ model), in nats per token.

It shows change that bits per byte misses: a model may score as well on a text and still predict differently. It is
measured on the held-out documents, in the windows in which they are scored; both models see the same ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from btx.models.opened import LOGITS, Opened
from btx.probes.bits_per_byte import padded, windows
from btx.probes.contract import Data, Document, Found, Probe


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


@torch.inference_mode()
def divergence(
    seed: Opened, model: Opened, documents: list[Document], *, length: int, batch_tokens: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """KL(seed ‖ model) of each document (documents,), in nats, summed over its tokens, over the shared vocabulary."""
    total = np.zeros(len(documents))
    pieces, start = windows(documents, length), 0
    vocabulary = seed.log_probs(torch.zeros(1, 1, dtype=torch.long, device=seed.device)).shape[-1]
    most = min(batch_tokens, LOGITS // vocabulary)  # tokens of a forward pass
    while start < len(pieces):
        batch = pieces[start : start + max(1, most // (len(pieces[start][1]) - 1))]
        inputs, targets = padded([ids for _, ids in batch])
        rows_BS = _kl(seed.log_probs(inputs.to(seed.device)), model.log_probs(inputs.to(model.device)))
        rows_BS = rows_BS.masked_fill((targets < 0).to(rows_BS.device), 0.0)
        for (number, _), nats in zip(batch, rows_BS.double().sum(1).tolist(), strict=True):
            total[number] += nats
        start += len(batch)
    return total


def _kl(seed_BSV: Tensor, model_BSV: Tensor) -> Tensor:
    common = min(seed_BSV.shape[-1], model_BSV.shape[-1])
    p, q = (found[..., :common].log_softmax(-1) for found in (seed_BSV, model_BSV))
    return (p.exp() * (p - q)).sum(-1)


PROBE = Probe(measure, reference=True)
