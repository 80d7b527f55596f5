"""What each layer knows already: the final norm and the output head applied to the residual stream after every layer.

The logit lens (nostalgebraist, "interpreting GPT: the logit lens", 2020), with the KL divergence to the last layer's
distribution as in arXiv 2303.08112. Everything is the model's own: its norm, its head, and what its class does after
that (scaling, capping). So the last layer's figures are those of the model itself. `depth` is the mean over tokens of
the first layer from which on the likeliest token stays the last layer's, as a share of the layers (prediction depth,
arXiv 2106.09647): knowledge that sits in lower layers shows as a smaller one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from btx.models.opened import HIDDEN_STATES, LOGITS, Opened, Stock
from btx.probes.bits_per_byte import windows
from btx.probes.contract import Data, Document, Found, Probe
from btx.recipe.fields import Count
from btx.recipe.settings import Settings

COLUMNS = ("bits_per_token", "accuracy", "nats_to_last", "agreement")


class LogitLensSettings(Settings):
    """The next token as each layer would predict it, through the model's own norm and head."""

    tokens: Count = Field(2048, description="tokens of each domain that are looked at, at most")


def measure(model: Opened, _reference: None, data: Data, settings: LogitLensSettings) -> Found:
    """Numbers of the last and the middle layer by domain; a row per domain and layer, 0 being the embeddings.

    Bits per token, the share of right next tokens, KL(last layer ‖ this layer) in nats per token, and how often the
    likeliest token is the last layer's.
    """
    assert isinstance(model, Stock)  # as its capabilities say
    rows: list[dict[str, Any]] = []
    numbers = {}
    for domain, documents in data.documents.items():
        means_LC, depth = _lens(model, documents, data.length, settings.tokens)
        last, middle = means_LC[-1], means_LC[(len(means_LC) - 1) // 2]
        numbers[domain] = {
            "bits_per_token": last[0], "accuracy": last[1], "middle_bits_per_token": middle[0],
            "middle_accuracy": middle[1], "middle_nats_to_last": middle[2], "depth": depth,
        }  # fmt: skip
        rows += [
            {"domain": domain, "layer": layer, **dict(zip(COLUMNS, row, strict=True))}
            for layer, row in enumerate(means_LC)
        ]
    return Found(numbers, rows)


@torch.inference_mode()
def _lens(model: Stock, documents: list[Document], length: int, most: int) -> tuple[list[list[float]], float]:
    """Means (layers + 1, COLUMNS) over the first tokens, and the depth; one window at a time."""
    sums: Tensor | None = None
    depth, seen = 0.0, 0
    for _, ids in sorted(windows(documents, length), key=lambda piece: piece[0]):
        ids = ids[: most - seen + 1]
        states = model.hidden_states(torch.from_numpy(ids[None, :-1]).to(model.device))
        targets = torch.from_numpy(ids[1:]).to(model.device)
        found_LCS, depth_S = _of_window(model, [state[0] for state in states], targets)
        sums = found_LCS.sum(-1) if sums is None else sums + found_LCS.sum(-1)
        depth, seen = depth + float(depth_S.sum()), seen + len(targets)
        if seen >= most:
            break
    assert sums is not None  # a domain has a document, and a document a token to score
    return (sums / seen).tolist(), depth / seen


def _of_window(model: Stock, states: list[Tensor], targets_S: Tensor) -> tuple[Tensor, Tensor]:
    """COLUMNS of every layer and token (L, C, S), and each token's depth (S,); logits of some tokens at a time."""
    several = max(1, LOGITS // model.net.config.vocab_size)
    found, depths = [], []
    for start in range(0, len(targets_S), several):
        part = slice(start, start + several)
        last = model.through_head(states[-1][part], normalise=False).log_softmax(-1)
        rows = []
        for layer, state_SD in enumerate(states):
            final = layer == len(states) - 1  # which transformers gives normalised
            log_p = last if final else model.through_head(state_SD[part], normalise=True).log_softmax(-1)
            best = log_p.argmax(-1)
            rows.append(torch.stack([
                functional.nll_loss(log_p, targets_S[part], reduction="none") / math.log(2),
                (best == targets_S[part]).float(),
                functional.kl_div(log_p, last, reduction="none", log_target=True).sum(-1),
                (best == last.argmax(-1)).float(),
            ]))  # fmt: skip
        layers_LCS = torch.stack(rows)
        settled_LS = layers_LCS[:, 3].flip(0).cumprod(0)  # from the last layer down, 1 as long as the answer stays
        depths.append(1 - (settled_LS.sum(0) - 1) / (len(states) - 1))
        found.append(layers_LCS)
    return torch.cat(found, -1).double(), torch.cat(depths).double()


PROBE = Probe(measure, settings=LogitLensSettings, needs=frozenset({HIDDEN_STATES}))
