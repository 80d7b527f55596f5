"""Bits per byte on held-out documents: −Σ log₂ p / bytes, with bootstrap intervals over source documents.

Per byte, not per token, so that models with different tokenizers are comparable. Each document is scored on its own,
in non-overlapping windows of `sequence_length`; only its text is scored, not the end-of-text token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from btx.data.sampler import IGNORED
from btx.models.opened import ROUTING, Opened, Stock
from btx.probes.contract import Data, Document, Found, Probe
from btx.probes.routing_shares import RoutingShares


def measure(model: Opened, _reference: None, data: Data, _settings: Any) -> Found:
    """Bits per byte of each domain and nats of each document; for a Mixture of Experts also the routing shares."""
    rows, numbers, routing = [], {}, {}
    for domain, documents in data.documents.items():
        shares = None
        if ROUTING in model.capabilities and isinstance(model, Stock) and model.routed:
            shares = RoutingShares(model.net, model.routed)
        found = nats(model, documents, length=data.length, batch_tokens=data.batch_tokens, watch=shares)
        sizes = np.array([size for _, size in documents], dtype=float)
        numbers[domain] = {"bits_per_byte": bits_per_byte(found, sizes)}
        rows += [{"domain": domain, "document": n, "nats": lost} for n, lost in enumerate(found.tolist())]
        if shares:
            routing[domain] = shares.table()
    return Found(numbers, rows, {"routing": routing} if routing else {})


def windows(documents: list[Document], length: int) -> list[tuple[int, NDArray[np.int64]]]:
    """(document number, ids) pieces of at most length + 1 ids that overlap by one, longest first."""
    pieces = [
        (n, ids[start : start + length + 1])
        for n, (ids, _) in enumerate(documents)
        for start in range(0, len(ids) - 1, length)
    ]
    return sorted(pieces, key=lambda piece: -len(piece[1]))


@torch.inference_mode()
def nats(
    model: Opened, documents: list[Document], *, length: int, batch_tokens: int,
    watch: Callable[[Tensor], None] | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Summed negative log-likelihood of each document, in nats.

    `watch` is called after each forward pass with a mask (tokens of the batch,), true for tokens of documents and false
    for padding; whatever else it reads, such as recorded routing, it holds itself.
    """
    total = np.zeros(len(documents))
    pieces = windows(documents, length)
    start = 0
    while start < len(pieces):
        rows = max(1, batch_tokens // (len(pieces[start][1]) - 1))
        batch = pieces[start : start + rows]
        inputs, targets = padded([ids for _, ids in batch])
        losses = model.losses(inputs.to(model.device), targets.to(model.device))
        if watch:
            watch((targets != IGNORED).flatten())
        for (number, _), loss in zip(batch, losses.double().sum(1).tolist(), strict=True):
            total[number] += loss
        start += rows
    return total


def padded(rows: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, S) of rows of ids; padding is on the right, so a causal model needs no attention mask."""
    width = max(len(ids) for ids in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), IGNORED)
    for n, ids in enumerate(rows):
        inputs[n, : len(ids) - 1] = torch.from_numpy(ids[:-1])
        targets[n, : len(ids) - 1] = torch.from_numpy(ids[1:])
    return inputs, targets


def bits_per_byte(nats: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    """Σ nats / (ln 2 · Σ bytes), over all documents together."""
    return float(nats.sum() / (math.log(2) * sizes.sum()))


def interval(
    nats: NDArray[np.float64], sizes: NDArray[np.float64], *, resamples: int, seed: int, sources: list[int]
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the bits per byte, over source documents resampled with replacement.

    `sources` gives the source document (a number) of each document: pieces of one source are not independent, so they
    are resampled together (cluster bootstrap).
    """
    _, group = np.unique(sources, return_inverse=True)
    lost, size = np.bincount(group, nats), np.bincount(group, sizes)
    draws = np.random.default_rng(seed).integers(0, len(lost), (resamples, len(lost)))
    values = lost[draws].sum(1) / (math.log(2) * size[draws].sum(1))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


PROBE = Probe(measure)
