"""What a token costs when a model is used: seconds of a prompt, and tokens per second after it, on this machine.

The only probe whose numbers are the machine's, not the model's: compare them within one run, as ratios. A pass that is
not counted comes first; each figure is the median of `rounds`.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from btx.models.opened import Opened
from btx.probes.contract import Data, Found, Probe
from btx.recipe.fields import Count
from btx.recipe.settings import Settings


class SpeedSettings(Settings):
    """Speed of a prompt and of decoding, on the machine that measures."""

    prompt_tokens: Count = 128
    new_tokens: Count = 32
    rounds: Count = 3


def measure(model: Opened, _reference: None, data: Data, settings: SpeedSettings) -> Found:
    """Numbers under `all`, and a row per round: what is decoded is fixed ids, so that all models do the same work."""
    ids = torch.cat([torch.from_numpy(ids) for documents in data.documents.values() for ids, _ in documents])
    wanted = settings.prompt_tokens + settings.new_tokens
    ids = ids.repeat(-(-wanted // len(ids)))[:wanted].to(model.device)
    rows = [_round(model, ids, settings.prompt_tokens) for _ in range(settings.rounds + 1)][1:]
    numbers = {name: median(row[name] for row in rows) for name in rows[0]}
    return Found({"all": numbers}, [{"round": n, **row} for n, row in enumerate(rows)])


def _round(model: Opened, ids: Any, prompt: int) -> dict[str, float]:
    started = _now(model)
    _, cache = model.prefill(ids[None, :prompt])
    filled = _now(model)
    for token in ids[prompt:]:
        _, cache = model.decode(token[None], cache)
    return {
        "prompt_seconds": filled - started, "tokens_per_second": (len(ids) - prompt) / (_now(model) - filled),
    }  # fmt: skip


def _now(model: Opened) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


PROBE = Probe(measure, settings=SpeedSettings)
