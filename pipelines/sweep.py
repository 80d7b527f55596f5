"""Searches the learning rates of a recipe, for BTX and for its dense control alike, on the select split.

    python pipelines/sweep.py pipelines/smollm2.yaml [--set A.B=VALUE ...]

The grids of learning rates are fixed before anything runs. The middle three are tried; while the best of them is at an
edge, the next one beyond it is tried too, so that an optimum lies at an edge only where the grid ends. Each of the
experts' rates is judged by the finetuned model that it leads to, with a finetuning at a sixth of it; then, at the best
of them, the finetuning's rate alone is varied. The control has the experts' grid. Nothing here reads the test split, on
which the recipe's own report is made. Steps that two settings share run once, and a stopped sweep resumes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from btx.cli.main import graph_of
from btx.errors import BtxError
from btx.steps.measure import Measure

RATES = ("3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2")  # of the experts, and of the control
SIXTHS = ("5e-6", "1.7e-5", "5e-5", "1.7e-4", "5e-4", "1.7e-3")  # of the finetuning
MIDDLE = (1, 4)
SHAPE = "| experts | finetuning | dense | model | {} | mean |"


class Sweep:
    """The models of one recipe, scored on the select split."""

    def __init__(self, recipe: Path, overrides: list[str]) -> None:
        self.recipe, self.overrides = recipe, [*overrides, "evaluate.split=select"]

    def score(self, step: str, **rates: str) -> list[float]:
        """Run the recipe up to a step at these rates; returns, and prints, its bits per byte by domain on select."""
        sets = [*self.overrides, *(f"{section}.learning_rate={rate}" for section, rate in rates.items())]
        flags = [part for one in sets for part in ("--set", one)]
        subprocess.run([sys.executable, "-m", "btx", "run", str(self.recipe), *flags, "--until", step], check=True)
        graph = graph_of(self.recipe, tuple(sets))
        measure = next(s for s in graph.steps.values() if isinstance(s, Measure) and s.model.label == step)
        measure.build(lambda _event: None)
        row = [found["bits_per_byte"] for found in measure.read().numbers.values()]
        cells = [rates.get("train", ""), rates.get("finetune", ""), rates.get("dense", ""), step]
        numbers = [f"{x:.3f}" for x in (*row, sum(row) / len(row))]
        print(f"| {' | '.join((*cells, *numbers))} |", flush=True)
        return row


def mean(row: list[float]) -> float:
    """The mean over domains, by which a setting is chosen."""
    return sum(row) / len(row)


def climb(ladder: tuple[str, ...], cost: Callable[[str], float]) -> str:
    """The rate of least cost; tries the middle ones and, while the best is at an edge, the next one beyond it."""
    low, high = MIDDLE
    found: dict[str, float] = {}
    while True:
        found |= {rate: cost(rate) for rate in ladder[low:high] if rate not in found}
        best = ladder.index(min(found, key=found.__getitem__))
        if best == low > 0:
            low -= 1
        elif best == high - 1 < len(ladder) - 1:
            high += 1
        else:
            return ladder[best]


def main() -> None:
    """Run the whole search."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("recipe", type=Path)
    arguments.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    said = arguments.parse_args()
    sweep = Sweep(said.recipe, said.overrides)
    try:
        names = graph_of(said.recipe, tuple(said.overrides)).recipe.domains
        print(SHAPE.format(" | ".join(names)))
        print("|---" * (SHAPE.count("|") - 1 + len(names) - 1) + "|", flush=True)

        def by_experts(rate: str) -> float:
            sweep.score("merge", train=rate)
            return mean(sweep.score("finetune", train=rate, finetune=SIXTHS[RATES.index(rate)]))

        dense = climb(RATES, lambda rate: mean(sweep.score("dense", dense=rate)))
        best = climb(RATES, by_experts)
        tuned = climb(SIXTHS, lambda rate: mean(sweep.score("finetune", train=best, finetune=rate)))
    except BtxError as error:
        sys.exit(f"btx: {error}")
    print(f"chosen on select: train {best}, finetune {tuned}, dense {dense}")


if __name__ == "__main__":
    main()
