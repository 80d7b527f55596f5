"""The rates that an arm of a comparison was given, and all that were tried for it: chosen on the select split alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from btx.events import Emit
from btx.graph.artifact import write_json
from btx.graph.step import Step
from btx.steps.measure import Measure

CHOICE = "choice.json"


class Choice(Step):
    """A report folder: choice.json, with the mean bits per byte of every trial."""

    kind: ClassVar[str] = "choice"
    arm: str
    tokens: int  # of the finals
    screened: dict[str, Measure]  # by the rates tried, "1e-3" or "1e-3/5e-4"
    confirmed: dict[str, Measure] = Field(default_factory=dict)  # the best and its neighbours with all tokens
    diverged: list[str] = Field(default_factory=list)
    chosen: str
    edge: bool  # whether the best rate is the last of those tried
    equivalents: float  # runs with all tokens that the search came to

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Write down what was tried."""
        tried = {rates: mean_of(measure) for rates, measure in self.screened.items()}
        write_json(out / CHOICE, {
            "arm": self.arm, "tokens": self.tokens, "chosen": self.chosen, "edge": self.edge,
            "equivalents": self.equivalents, "diverged": self.diverged, "screened": tried,
            "confirmed": {rates: mean_of(measure) for rates, measure in self.confirmed.items()},
        })  # fmt: skip
        return {"chosen": self.chosen}


def mean_of(measure: Measure) -> float:
    """Mean over the domains of a model's bits per byte."""
    numbers = measure.read().numbers
    return math.fsum(found["bits_per_byte"] for found in numbers.values()) / len(numbers)
