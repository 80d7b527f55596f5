"""Bits per byte on held-out documents: −Σ log₂ p / bytes, with bootstrap intervals over source documents.

Bytes, not tokens, so that models of different tokenizers compare. Each document is scored on its own, in windows of
`sequence_length` that do not overlap; only its text counts, not the mark that ends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import MoeModelOutputWithPast

from btx.data.sampler import IGNORED

LOGITS = 2**24  # at once: 64 MiB in float32
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
def nats(
    model: Any, documents: list[Document], *, length: int, batch_tokens: int,
    watch: Callable[[Tensor], None] | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Summed negative log-likelihood of each document, in nats.

    `watch` is called after each forward pass with a mask (tokens of the batch,) that is true where a token is one of a
    document, and not padding; what else it looks at it has by itself, such as the routers' record.
    """
    total = np.zeros(len(documents))
    pieces = windows(documents, length)
    start = 0
    while start < len(pieces):
        rows = max(1, batch_tokens // (len(pieces[start][1]) - 1))
        batch = pieces[start : start + rows]
        inputs, targets = _padded([ids for _, ids in batch])
        losses = token_losses(model, inputs.to(model.device), targets.to(model.device))
        if watch:
            watch((targets != IGNORED).flatten())
        for (number, _), loss in zip(batch, losses.double().sum(1).tolist(), strict=True):
            total[number] += loss
        start += rows
    return total


def _padded(rows: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, S) of rows of ids; padding stands at the end, so that a causal model needs no mask."""
    width = max(len(ids) for ids in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), IGNORED)
    for n, ids in enumerate(rows):
        inputs[n, : len(ids) - 1] = torch.from_numpy(ids[:-1])
        targets[n, : len(ids) - 1] = torch.from_numpy(ids[1:])
    return inputs, targets


def token_losses(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Minus log p of each target, in nats, float32 (B, S), zero where it is IGNORED; logits of a few rows at a time.

    The body runs once, in a pass of the whole model whose head sees the last position alone. Then the model's own
    `forward` is given rows of what the body gave, so that whatever its class does behind the body (scaling, capping)
    is done, and the logits of the whole batch, which may be larger than the model, never exist at once.
    """
    seen: list[Tensor] = []
    body = model.base_model
    handle = body.register_forward_hook(lambda _module, _args, output: seen.append(output.last_hidden_state))
    try:
        model(input_ids=inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    kept = targets != IGNORED
    found = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    found[kept] = _head_losses(model, seen[0][kept], targets[kept])
    return found


class _Body(nn.Module):
    """Stands in for a body, with what it gave."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.output = MoeModelOutputWithPast(last_hidden_state=hidden)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _head_losses(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Losses (N,) of rows (N, D) that the body gave."""
    name, body = model.base_model_prefix, model.base_model
    rows = max(1, LOGITS // model.config.vocab_size)
    losses = [torch.zeros(0, device=hidden.device)]
    try:
        for some, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            setattr(model, name, _Body(some[None]))
            logits = model.forward(input_ids=wanted[None], use_cache=False).logits[0]
            losses.append(functional.cross_entropy(logits.float(), wanted, reduction="none"))
    finally:
        setattr(model, name, body)
    return torch.cat(losses)


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
