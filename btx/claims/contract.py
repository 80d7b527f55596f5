"""The interface of a claim: a module of this folder whose `CLAIM` judges a report's results, as far as they tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Results = Mapping[str, Any]  # results.json of a report
Verdict = Literal["held", "held in part", "did not hold", "cannot tell"]
NEUTRAL = "seed"  # the seed's own text, among the domains of the probes


@dataclass(frozen=True)
class Finding:
    """What a run says of a claim. Gain and forgetting are told together, since either alone misleads."""

    gain: str
    forgetting: str
    cost: Mapping[str, float]  # as btx/report/ledger.py counts it
    measured: str  # in sentences
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """One claim of the founding note; `judge` returns None where a report does not speak to it."""

    number: int  # its place in the founding note
    system: str
    claimed: str
    source: str  # what the paper says, with its number, and who contradicts it
    judge: Callable[[Results], Finding | None]


def gained(results: Results, model: str) -> float | None:
    """Mean bits per byte over the domains that a model gained over the seed; None without it."""
    mean = results["mean"]
    return mean["seed"] - mean[model] if model in mean else None


def forgotten(results: Results, model: str) -> float | None:
    """Nats per token that a model lost on the seed's own text; None if that was not measured."""
    return _of_probe(results, "forgetting", model, NEUTRAL, "change_nats_per_token")


def middle(results: Results, model: str) -> float | None:
    """Bits per token of the seed's own text as a model's middle layer predicts it; None if that was not measured."""
    return _of_probe(results, "logit_lens", model, NEUTRAL, "middle_bits_per_token")


def _of_probe(results: Results, probe: str, model: str, domain: str, number: str) -> float | None:
    found = results.get("probes", {}).get(probe, {}).get(model, {}).get(domain, {})
    value = found.get(number) if isinstance(found, Mapping) else None
    return None if value is None else float(value)


def verdict(parts: Sequence[bool]) -> Verdict:
    """Held if every part of a claim did, in part if some did."""
    return "held" if all(parts) else "held in part" if any(parts) else "did not hold"


def bits(value: float | None) -> str:
    """A gain in bits per byte."""
    return "not measured" if value is None else f"{value:.3f} bits/byte"


def nats(value: float | None) -> str:
    """A loss in nats per token on the seed's own text."""
    return "not measured" if value is None else f"{value:+.3f} nats/token"


def points(before: float, after: float) -> str:
    """Two shares in percent."""
    return f"{100 * before:.0f} → {100 * after:.0f} % right"
