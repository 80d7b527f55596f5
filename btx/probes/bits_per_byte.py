"""Bits per byte on held-out documents: −Σ log₂ p / bytes, with bootstrap intervals over source documents.

Bytes, not tokens, so that models of different tokenizers compare. Each document is scored on its own, in windows of
`sequence_length` that do not overlap; only its text counts, not the mark that ends it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from btx.stream import IGNORED

Document = tuple[NDArray[np.int64], int]  # ids led by one of context, bytes of text


def windows(documents: list[Document], length: int) -> list[tuple[int, NDArray[np.int64]]]:
    """(document number, ids) pieces of at most length + 1 ids that overlap by one, longest first."""
    pieces = [
        (n, ids[start : start + length + 1])
        for n, (ids, _) in enumerate(documents)
        for start in range(0, len(ids) - 1, length)
    ]
    return sorted(pieces, key=lambda piece: -len(piece[1]))


@torch.inference_mode()
def nats(model: Any, documents: list[Document], *, length: int, batch_tokens: int) -> NDArray[np.float64]:
    """Summed negative log-likelihood of each document, in nats."""
    total = np.zeros(len(documents))
    pieces = windows(documents, length)
    start = 0
    while start < len(pieces):
        rows = max(1, batch_tokens // (len(pieces[start][1]) - 1))
        batch = pieces[start : start + rows]
        for (number, _), loss in zip(batch, _losses(model, [ids for _, ids in batch]), strict=True):
            total[number] += loss
        start += rows
    return total


def _losses(model: Any, rows: list[NDArray[np.int64]]) -> list[float]:
    width = max(len(ids) for ids in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), IGNORED)
    for n, ids in enumerate(rows):
        inputs[n, : len(ids) - 1] = torch.from_numpy(ids[:-1])
        targets[n, : len(ids) - 1] = torch.from_numpy(ids[1:])
    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits
    loss = functional.cross_entropy(
        logits.float().transpose(1, 2), targets.to(model.device), ignore_index=IGNORED, reduction="none"
    )
    return loss.double().sum(1).tolist()


def bits_per_byte(nats: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    """Over all documents together."""
    return float(nats.sum() / (math.log(2) * sizes.sum()))


def interval(
    nats: NDArray[np.float64], sizes: NDArray[np.float64], *, resamples: int, seed: int, sources: list[int]
) -> tuple[float, float]:
    """95 % percentile interval of the bits per byte when source documents are drawn again with replacement.

    `sources` has the number of the source document of each document: pieces of one are not independent, so they are
    drawn together (the cluster bootstrap).
    """
    _, group = np.unique(sources, return_inverse=True)
    lost, size = np.bincount(group, nats), np.bincount(group, sizes)
    draws = np.random.default_rng(seed).integers(0, len(lost), (resamples, len(lost)))
    values = lost[draws].sum(1) / (math.log(2) * size[draws].sum(1))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
