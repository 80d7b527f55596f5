"""What came out and what it cost: results.json, pictures, and a page made of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from btx.events import Emit
from btx.graph.artifact import LOGS, read_manifest, write_json
from btx.graph.cost import Cost
from btx.graph.step import Step
from btx.steps.evaluate import Evaluate
from btx.steps.export import Export
from btx.steps.model import ModelStep

POLICY = "policy.json"  # beside a policy's weights: what was seen of its held-out items, by step


class Report(Step):
    """A report folder for people: report.html and its pictures; and results.json with costs and lineage."""

    kind: ClassVar[str] = "report"
    version: ClassVar[int] = 2
    evaluate: Evaluate
    export: Export

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Join the evaluation with the costs and draw."""
        from btx.report.charts import matrix_svg, routing_svg
        from btx.report.curves import layers_svg, training_svg
        from btx.report.ledger import spent
        from btx.report.page import page

        results = json.loads((self.evaluate.folder / "results.json").read_text(encoding="utf-8"))
        found = _ancestors(self)
        trained = {label: read_manifest(s.folder) for label, s in found.items() if s.trains}
        metrics = {label: rows for label in trained if (rows := _metrics(found[label].folder))}
        results["exported"] = self.evaluate.name_of(self.export.model)
        results["cost"] = {
            label: {k: m["facts"][k] for k in ("tokens", "steps", "training_flops", "parameters")}
            for label, m in trained.items()
        }
        results["lineage"] = {
            label: {"folder": step.folder.name, "digest": step.digest}
            for label, step in found.items() if isinstance(step, ModelStep)
        }  # fmt: skip
        results["spent"] = {
            name: spent(one.model, self.evaluate.seed).written() for name, one in self.evaluate.measures.items()
        }
        results["policies"] = {
            name: found for name, one in self.evaluate.measures.items() if (found := _policy(one.model.folder))
        }
        write_json(out / "results.json", results)
        (out / LOGS).mkdir()
        write_json(
            out / LOGS / "seconds.json", {label: (Cost.read(m) or Cost()).wall_seconds for label, m in trained.items()}
        )
        pictures = {
            "matrix.svg": matrix_svg(results), "routing.svg": routing_svg(results), "layers.svg": layers_svg(results),
            "training.svg": training_svg(metrics),
        }  # fmt: skip
        for name, picture in pictures.items():
            (out / name).write_text(picture, encoding="utf-8")
        (out / "report.html").write_text(
            page(self.export.title, results, pictures, self._texts(results)), encoding="utf-8"
        )
        return {"mean": results["mean"]}

    def _texts(self, results: dict[str, Any]) -> str:
        """Sample texts with the experts of their tokens, if the recipe asked for the probe."""
        from btx.data.packed import load_tokenizer
        from btx.report.tokens import token_view

        found = self.evaluate.others.get("token_routing", {}).get(results["exported"])
        rows = found.rows() if found else []
        if not rows:
            return ""
        tokenizer = load_tokenizer(self.export.folder)
        pieces = {n: tokenizer.decode([n]) for n in {row["id"] for row in rows}}
        return token_view(rows, pieces, results["experts"])


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """What a training wrote down of every step; nothing if its loss is no cross-entropy."""
    file = folder / LOGS / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _policy(folder: Path) -> dict[str, Any]:
    """What was seen of a policy's held-out items before its first step and after its last; nothing of other models."""
    file = folder / POLICY
    said = read_manifest(folder)["facts"].get("policy") if file.is_file() else None
    if not said:
        return {}
    numbers = json.loads(file.read_text(encoding="utf-8"))
    return {**said, "first": numbers["0"], "last": numbers[max(numbers, key=int)]}


def _ancestors(step: Step) -> dict[str, Step]:
    found: dict[str, Step] = {}
    for label, parent in step.parents.items():
        found |= _ancestors(parent)
        found[label] = parent
    return found
