"""What the conversions of a comparison cost and gained: its results, and the page that opens with the answer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from btx.events import Emit
from btx.graph.artifact import read_manifest, write_json
from btx.graph.step import Step
from btx.recipe.settings import Settings
from btx.steps.choice import CHOICE, Choice
from btx.steps.measure import Measure

RESULTS, PAGE = "comparison.json", "comparison.html"


class Run(Settings):
    """One final run: which arm, at which budget, on which block, at which rates."""

    arm: str
    conversion: str
    budget: int  # its place in the list of budgets
    tokens: int
    block: int
    rates: list[float]


class LostArm(Settings):
    """An arm that diverged at a budget: at every rate that was tried, or in the finals on some blocks."""

    arm: str
    conversion: str
    budget: int
    tokens: int
    rates: list[float] = Field(default_factory=list)  # that were chosen; none if all diverged
    blocks: list[int] = Field(default_factory=list)

    @property
    def where(self) -> str:
        """At every rate, or on which blocks."""
        if not self.blocks:
            return "at every rate that was tried"
        rates = "/".join(f"{rate:g}" for rate in self.rates)
        return f"on block{'s' * (len(self.blocks) > 1)} {', '.join(map(str, self.blocks))} at the chosen {rates}"


class Comparison(Step):
    """A report folder: comparison.json and comparison.html."""

    kind: ClassVar[str] = "comparison"
    title: str
    control: str
    scratch: str
    runs: list[Run]
    finals: list[Measure]  # of the runs, in their order
    stages: list[dict[str, Measure]]  # of the runs, in their order: models on the way, where the conversion merges
    seeds: dict[str, Measure]  # by block
    choices: list[Choice] = Field(default_factory=list)
    lost: list[LostArm] = Field(default_factory=list)
    budgets: list[int] = Field(default_factory=list)  # in tokens
    flops: list[float] = Field(default_factory=list)  # the budgets, where they are FLOPs

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Read what was measured, judge, write and draw."""
        from btx.report.comparison import judged
        from btx.report.comparison_page import page
        from btx.report.figures import human
        from btx.report.ledger import spent

        results: dict[str, Any] = {
            "title": self.title, "control": self.control, "scratch": self.scratch,
            "split": self.finals[0].settings.split, "precision": self.finals[0].settings.precision,
            "documents": dict(Counter(str(row["domain"]) for row in self.finals[0].rows())),  # that were scored
            "seeds": {block: {"bits_per_byte": _bits(one), **_pretraining(one)} for block, one in self.seeds.items()},
            "runs": [
                {
                    **run.model_dump(), "bits_per_byte": _bits(final),
                    "stages": {name: _bits(measure) for name, measure in stages.items()},
                    "cost": spent(final.model, self.seeds[str(run.block)].model).written(),
                    "digest": final.model.digest, "model": final.model.folder.name,
                    "parameters": read_manifest(final.model.folder)["facts"].get("parameters"),
                }
                for run, final, stages in zip(self.runs, self.finals, self.stages, strict=True)
            ],
            "lost": [{**one.model_dump(), "where": one.where} for one in self.lost],
            "budgets": [f"{human(one)} FLOPs" for one in self.flops] or [f"{one:,} tokens" for one in self.budgets],
            "choices": [json.loads((one.folder / CHOICE).read_text(encoding="utf-8")) for one in self.choices],
        }  # fmt: skip
        results |= judged(results)
        write_json(out / RESULTS, results)
        (out / PAGE).write_text(page(results), encoding="utf-8")
        return {"answer": results["answer"]}


def _bits(measure: Measure) -> dict[str, float]:
    return {domain: found["bits_per_byte"] for domain, found in measure.read().numbers.items()}


def _pretraining(measure: Measure) -> dict[str, Any]:
    """What the seed cost, where btx made it; nothing is known of one that was given."""
    facts = read_manifest(measure.model.folder)["facts"] if measure.model.trains else {}
    return {"tokens": facts.get("tokens"), "flops": facts.get("training_flops")}
