"""What a model cost after the seed, told two ways: as a sum, and along the critical path."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from btx.graph.artifact import read_manifest
from btx.graph.step import Step


@dataclass(frozen=True)
class Spent:
    """Tokens, optimiser steps and training FLOPs: of all trainings, and of the longest chain of them.

    Trainings that need nothing of each other can run at once, so the chain is what the fastest set of machines still
    has to do one after another. FLOPs are 6 · active parameters · tokens.
    """

    tokens: int = 0
    steps: int = 0
    flops: float = 0.0
    path_tokens: int = 0
    path_steps: int = 0
    path_flops: float = 0.0

    def written(self) -> dict[str, Any]:
        """For results."""
        return asdict(self)


def spent(model: Step, seed: Step) -> Spent:
    """What the trainings after the seed cost that a published model was made by, itself included."""
    seen: dict[str, tuple[int, int, float]] = {}
    path = _path(model, seed.key, seen, {})
    whole = [sum(column) for column in zip(*seen.values(), strict=True)] or [0, 0, 0.0]
    return Spent(int(whole[0]), int(whole[1]), float(whole[2]), *path)


def _path(
    step: Step, seed: str, seen: dict[str, tuple[int, int, float]], known: dict[str, tuple[int, int, float]]
) -> tuple[int, int, float]:
    if step.key == seed:
        return 0, 0, 0.0
    if step.key not in known:
        before = [_path(parent, seed, seen, known) for parent in step.parents.values()]
        tokens, steps, flops = max(before, key=lambda one: one[2], default=(0, 0, 0.0))
        if step.trains:
            facts = read_manifest(step.folder)["facts"]
            own = int(facts["tokens"]), int(facts["steps"]), float(facts["training_flops"])
            seen[step.key] = own
            tokens, steps, flops = tokens + own[0], steps + own[1], flops + own[2]
        known[step.key] = tokens, steps, flops
    return known[step.key]
