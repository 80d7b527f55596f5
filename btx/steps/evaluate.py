"""Bits per byte of every model on every domain's held-out documents, and the routing shares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from btx.data.heldout import LEAST
from btx.events import Emit, Warned
from btx.graph.artifact import write_json
from btx.graph.step import Step
from btx.recipe.fields import later
from btx.recipe.settings import EvaluateSettings
from btx.steps.branch import require_positions
from btx.steps.measure import MISSING, Measure
from btx.steps.merge import SEED
from btx.steps.model import ModelStep
from btx.steps.overlap import Overlap
from btx.steps.solve import Solve
from btx.steps.tokens import TokensStep

if TYPE_CHECKING:
    from btx.probes.contract import Found


class Evaluate(Step):
    """A report folder: results.json. The score of every document is in the folders of the measurements."""

    kind: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 6
    seed: ModelStep
    measures: dict[str, Measure]  # bits per byte, by the name that results.json gives the model
    others: dict[str, dict[str, Measure]] = Field(default_factory=dict)  # of further probes, by probe and model
    selected: dict[str, Measure] = Field(default_factory=dict)  # a model before and after finetuning, on select
    tasks: dict[str, dict[str, Solve]] = later({})  # by task and model
    overlaps: dict[str, Overlap] = later({})  # by task: its items in the training text
    tokens: dict[str, TokensStep]
    settings: EvaluateSettings

    def check(self, asked: int) -> None:
        """RecipeError if a window is longer than the seed's max_position_embeddings."""
        section = "evaluate" if self.settings.sequence_length else "train"
        for measure in self.measures.values():
            require_positions(self.seed, f"{section}.sequence_length", measure.length)

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Collect the measurements and write the results."""
        from btx.data.packed import Tokens
        from btx.models.mixture import branches_in

        folders = {n: Tokens(t.folder) for n, t in self.tokens.items()}
        documents = {n: t.valid(self.settings.tokens, self.settings.split) for n, t in folders.items()}
        sources = {n: t.sources(len(documents[n]), self.settings.split) for n, t in folders.items()}
        for name, found in sources.items():
            self._tell_few(name, len(set(found)), emit)
        read = _read(self.measures)
        scores = {name: _nats(found.rows) for name, found in read.items()}
        results = summarise(scores, documents, sources, self.settings)
        results["routing"] = {name: found.tables["routing"] for name, found in read.items() if found.tables}
        routed = [measure for measure in self.measures.values() if measure.rule]
        results["experts"] = branches_in(routed[0].model.folder) if routed else []
        if self.others:
            results["probes"] = {
                probe: {name: found.numbers or {MISSING: found.missing} for name, found in _read(measures).items()}
                for probe, measures in self.others.items()
            }
        if self.tasks:
            results["tasks"] = {task: self._task(task) for task in self.tasks}
        if gain := self._finetuned(emit):
            results["finetuning"] = gain
        write_json(out / "results.json", results)
        return {"mean": results["mean"]}

    def name_of(self, model: Step) -> str:
        """The name that results.json gives a model that was measured."""
        return next(name for name, measure in self.measures.items() if measure.model.key == model.key)

    def _task(self, task: str) -> dict[str, Any]:
        """Every model's numbers on a task, what changed from the seed item by item, and contamination."""
        from btx.tasks.statistics import paired

        right = {name: [row["right"] for row in step.rows()] for name, step in self.tasks[task].items()}
        return {
            "models": {name: step.numbers() for name, step in self.tasks[task].items()},
            "from_seed": {name: paired(right[SEED], found) for name, found in right.items() if name != SEED},
            "contamination": self.overlaps[task].numbers() if task in self.overlaps else {},
        }

    def _finetuned(self, emit: Emit) -> dict[str, Any]:
        """Mean bits per byte on select before and after the finetuning; a warning if it ended worse."""
        found = {name: measure.read().numbers for name, measure in self.selected.items()}
        if not found or not all(found.values()):
            return {}
        (before, first), (after, last) = (
            (name, sum(one["bits_per_byte"] for one in numbers.values()) / len(numbers))
            for name, numbers in found.items()
        )
        if last > first:
            emit(Warned(self.label, worse(before, first, after, last)))
        return {"split": "select", "before": before, "after": after, "mean": {before: first, after: last}}

    def _tell_few(self, domain: str, count: int, emit: Emit) -> None:
        """Warn about a domain with few held-out source documents."""
        if count < LEAST:
            emit(Warned(
                self.label,
                f"{domain}: intervals over {count} held-out source documents are too narrow, {LEAST} or more are "
                "better. Raise evaluate.tokens, lower data.valid_bytes, or give the domain more documents",
            ))  # fmt: skip


def worse(before: str, first: float, after: str, last: float) -> str:
    """What is said of a finetuning that ended worse than it began."""
    return (
        f"the finetuning ended worse on select than it began: {after} {last:.3f} bits per byte, {before} {first:.3f}. "
        "Lower finetune.learning_rate, often to a sixth of the experts', or give it more tokens"
    )


def _read(measures: dict[str, Measure]) -> dict[str, Found]:
    return {name: measure.read() for name, measure in measures.items()}


def _nats(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The nats of each document, as arrays by domain."""
    import numpy as np

    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["domain"], []).append(row["nats"])
    return {domain: np.array(nats) for domain, nats in found.items()}


def summarise(
    scores: dict[str, Any], documents: dict[str, Any], sources: dict[str, list[int]], settings: EvaluateSettings
) -> dict[str, Any]:
    """Bits per byte by model and domain, 95 % intervals of them and of their differences from the seed, and sizes.

    Differences are paired by document before the sources are resampled, so their intervals are narrower than those of
    the two sides: the difficulty of the documents cancels.
    """
    import numpy as np

    from btx.probes.bits_per_byte import bits_per_byte, interval

    sizes = {d: np.array([size for _, size in rows], dtype=float) for d, rows in documents.items()}
    table = {m: {d: bits_per_byte(v, sizes[d]) for d, v in row.items()} for m, row in scores.items()}
    drawn = {"resamples": settings.bootstrap, "seed": settings.seed}
    held_out = {
        d: {
            "documents": len(rows),
            "sources": len(set(sources[d])),
            "bytes": int(sizes[d].sum()),
            "tokens": sum(len(ids) - 1 for ids, _ in rows),
        }
        for d, rows in documents.items()
    }
    return {
        "bits_per_byte": table,
        "mean": {m: sum(row.values()) / len(row) for m, row in table.items()},
        "interval_95": {
            m: {d: interval(v, sizes[d], sources=sources[d], **drawn) for d, v in row.items()}
            for m, row in scores.items()
        },
        "difference_from_seed_95": {
            m: {d: interval(v - scores[SEED][d], sizes[d], sources=sources[d], **drawn) for d, v in row.items()}
            for m, row in scores.items()
        },
        "held_out": held_out,
        "split": settings.split,
    }
