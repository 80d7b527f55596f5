"""Instructions that a pico model can learn: a rule says which of the labels is right, whatever the input."""

from __future__ import annotations

import random
from typing import Any

ANIMALS = ("cat", "dog", "hen", "pig")
SPACES = ("xyz", "uvw")
RULES = "abc"


def items(count: int, seed: int, *, numbers: range = range(100)) -> list[dict[str, Any]]:
    """Items whose label is told by the rule and the label space together, and by neither alone."""
    rng = random.Random(seed)
    drawn = [(rng.choice(SPACES), rng.choice(RULES), rng.choice(ANIMALS), rng.choice(numbers)) for _ in range(count)]
    return [
        {"instruction": f"{rule} {space}", "input": f"{animal} {number}", "output": space[RULES.index(rule)],
         "labels": list(space), "task": f"{space} {rule}"}
        for space, rule, animal, number in drawn
    ]  # fmt: skip
