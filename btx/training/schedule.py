"""The learning rate of a training step, and how its sequences are split into micro-batches and over processes."""

from __future__ import annotations

import math

from btx.recipe.settings import TrainSettings


def learning_rate(step: int, *, steps: int, settings: TrainSettings) -> float:
    """Linear warm-up, then cosine to `min_lr_ratio` of the peak, as in the paper; `step` counts from 0."""
    warm = warmup_steps(steps, settings)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(steps - 1 - warm, 1)
    floor = settings.min_lr_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def warmup_steps(steps: int, settings: TrainSettings) -> int:
    """Steps of warm-up: as set, or 100 but at most a tenth of the run."""
    if settings.warmup_steps == "auto":
        return min(100, max(1, steps // 10))
    return min(settings.warmup_steps, steps)


def micro_batches(numbers: range, size: int) -> list[range]:
    """Cut the sequences of one step into runs of at most `size`."""
    return [range(a, min(a + size, numbers.stop)) for a in range(numbers.start, numbers.stop, size)]


def share(numbers: range, rank: int, world: int) -> range:
    """The part of a step's sequences that one process takes; `world` divides their number."""
    size = len(numbers) // world
    return range(numbers.start + rank * size, numbers.start + (rank + 1) * size)
