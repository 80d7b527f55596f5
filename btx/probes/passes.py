"""Passes over held-out documents in which the seed and a model see the same ids."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from btx.models.opened import LOGITS, Opened
from btx.probes.bits_per_byte import padded, windows
from btx.probes.contract import Document


@torch.inference_mode()
def passes(
    models: list[Opened], documents: list[Document], *, length: int, batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
    """Yields document numbers (B,), targets (B, S), negative at padding, and each model's log-probabilities (B, S, V).

    V is the shared vocabulary, over which they are normalised; all tensors are on the first model's device. A pass has
    at most `batch_tokens` tokens, and log-probabilities of at most 64 MiB per model.
    """
    device = models[0].device
    pieces, start = windows(documents, length), 0
    probe = torch.zeros(1, 1, dtype=torch.long)
    common = min(model.log_probs(probe.to(model.device)).shape[-1] for model in models)
    most = min(batch_tokens, LOGITS // common)
    while start < len(pieces):
        batch = pieces[start : start + max(1, most // (len(pieces[start][1]) - 1))]
        inputs, targets = padded([ids for _, ids in batch])
        each = [model.log_probs(inputs.to(model.device))[..., :common].log_softmax(-1).to(device) for model in models]
        yield [number for number, _ in batch], targets.to(device), each
        start += len(batch)
