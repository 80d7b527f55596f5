"""Instruction tuning beside its controls: how much of what it teaches is the output space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btx.claims.contract import Claim, Finding, Results, forgotten, nats, points, verdict

TUNED = "sft"
NEAR = 0.1  # of accuracy: two that differ by less are alike


def judge(results: Results) -> Finding | None:
    """Held if the output space alone gives the compliance of the original; wholly if it gives its accuracy too."""
    found = _labelled(results)
    if found is None:
        return None
    seed, own, space = found["seed"], found[TUNED], found[f"{TUNED}-simplified"]
    others = [name for name in found if name.startswith(f"{TUNED}-")]
    told = [f"{name.removeprefix('sft-')} {_of(found[name])}" for name in others]
    measured = (
        f"Labels, and right answers: seed {_of(seed)}; original {_of(own)}; {'; '.join(told)}. "
        f"A random label is right {own['chance']:.0%} of the time."
    )
    alike = [abs(own[number] - space[number]) < NEAR for number in ("compliance", "accuracy")]
    gain = points(seed["accuracy"], own["accuracy"])
    return Finding(gain, nats(forgotten(results, TUNED)), results["spent"][TUNED], measured, verdict(alike))


def _labelled(results: Results) -> dict[str, dict[str, Any]] | None:
    """The models of the first task of kind label that asked the original and the simplified control."""
    for task in results.get("tasks", {}).values():
        models: Mapping[str, Any] = task["models"]
        if {TUNED, f"{TUNED}-simplified"} <= {*models} and "compliance" in models[TUNED]:
            return dict(models)
    return None


def _of(numbers: Mapping[str, Any]) -> str:
    return f"{numbers['compliance']:.0%} and {numbers['accuracy']:.0%}"


CLAIM = Claim(
    7,
    "instruction controls",
    "Instruction tuning teaches the output space.",
    "arXiv 2305.11383: 43 % with the original instructions, and 42.6 % for a random guess in the label space, at a "
    "handful of instances for each task.",
    judge,
)
