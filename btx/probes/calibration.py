"""Whether a model is as sure of its next token as it is right: expected calibration error, Brier score and AUROC.

Items are next tokens on held-out text; the confidence is the probability of the likeliest one. ECE is over ten bins of
equal width (arXiv 1706.04599), Brier the mean of (confidence − right)², AUROC the chance that a right prediction is
more confident than a wrong one, ties counted half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from btx.models.opened import Opened
from btx.probes.contract import Data, Found, Probe
from btx.probes.passes import passes

BINS = 10


def measure(model: Opened, _reference: None, data: Data, _settings: Any) -> Found:
    """Numbers by domain, and a row per token with its document, the confidence and whether it was right."""
    rows: list[dict[str, Any]] = []
    numbers = {}
    for domain, documents in data.documents.items():
        sure, right, of = [], [], []
        for where, targets, (found,) in passes([model], documents, length=data.length, batch_tokens=data.batch_tokens):
            counted = targets >= 0
            best, chosen = found.max(-1)
            sure.append(best.exp()[counted].double().cpu().numpy())
            right.append((chosen == targets)[counted].cpu().numpy())
            of.append(np.repeat(where, counted.sum(1).cpu().numpy()))
        confidence, hit = np.concatenate(sure), np.concatenate(right)
        numbers[domain] = scores(confidence, hit)
        rows += [
            {"domain": domain, "document": int(n), "confidence": float(c), "right": bool(r)}
            for n, c, r in zip(np.concatenate(of), confidence, hit, strict=True)
        ]
    return Found(numbers, rows)


def scores(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> dict[str, float]:
    """ECE, Brier, AUROC (one half where all are right or none) and accuracy of (N,) items."""
    from scipy.stats import rankdata

    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence, minlength=BINS)
    hits, misses = int(right.sum()), int((~right).sum())
    ranks = rankdata(confidence)[right].sum()
    return {
        "ece": float(np.abs(gaps).sum() / len(right)), "brier": float(((confidence - right) ** 2).mean()),
        "auroc": float((ranks - hits * (hits + 1) / 2) / (hits * misses)) if hits and misses else 0.5,
        "accuracy": float(right.mean()),
    }  # fmt: skip


PROBE = Probe(measure)
