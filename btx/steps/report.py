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


class Report(Step):
    """A report folder for people: report.html, matrix.svg, routing.svg; and results.json with the costs."""

    kind: ClassVar[str] = "report"
    evaluate: Evaluate
    export: Export

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Join the evaluation with the costs and draw."""
        from btx.report.charts import matrix_svg, routing_svg
        from btx.report.page import page

        results = json.loads((self.evaluate.folder / "results.json").read_text(encoding="utf-8"))
        trained = {label: read_manifest(s.folder) for label, s in _ancestors(self).items() if s.trains}
        results["exported"] = self.evaluate.name_of(self.export.model)
        results["cost"] = {
            label: {k: m["facts"][k] for k in ("tokens", "steps", "training_flops", "parameters")}
            for label, m in trained.items()
        }
        write_json(out / "results.json", results)
        (out / LOGS).mkdir()
        write_json(
            out / LOGS / "seconds.json", {label: (Cost.read(m) or Cost()).wall_seconds for label, m in trained.items()}
        )
        pictures = {"matrix.svg": matrix_svg(results), "routing.svg": routing_svg(results)}
        for name, picture in pictures.items():
            (out / name).write_text(picture, encoding="utf-8")
        (out / "report.html").write_text(page(self.export.title, results, pictures), encoding="utf-8")
        return {"mean": results["mean"]}


def _ancestors(step: Step) -> dict[str, Step]:
    found: dict[str, Step] = {}
    for label, parent in step.parents.items():
        found |= _ancestors(parent)
        found[label] = parent
    return found
