"""Contamination of a task: which of its items' questions stand in the text that models are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from btx.events import Emit, Warned
from btx.graph.artifact import write_json
from btx.graph.step import Step
from btx.recipe.fields import execution
from btx.recipe.task_settings import TaskSettings
from btx.steps.measure import NUMBERS, ROWS, write_rows
from btx.steps.tokens import TokensStep


class Overlap(Step):
    """A report folder: numbers.json with the items found by domain, and rows.parquet with a row for each."""

    kind: ClassVar[str] = "overlap"
    version: ClassVar[int] = 1
    task: TaskSettings
    content: list[str]  # digests of the items' file, and of the examples' if there are any
    file: str = execution("")
    examples: str | None = execution(None)
    tokens: dict[str, TokensStep]  # in the seed's tokenizer

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Look for every question in every domain's training tokens, and warn of those that are there."""
        from btx.data.packed import Encoder, Tokens, load_tokenizer
        from btx.tasks.items import read_items
        from btx.tasks.overlap import found_in, inner

        items = read_items(self.task, self.file, self.examples)
        rows: list[dict[str, Any]] = []
        checked: dict[str, int] = {}
        for name, step in self.tokens.items():
            encoder = Encoder(load_tokenizer(step.tokenizer.folder), "all")
            led = encoder.start is not None
            questions = [inner(encoder.prompt(item.question)[led:]) for item in items]
            checked[name] = sum(map(bool, questions))
            found = sorted(found_in(Tokens(step.folder).train, questions))
            rows += [{"domain": name, "item": n, "prompt_sha256": items[n].digest} for n in found]
            if found:
                emit(Warned(
                    self.label,
                    f"{len(found)} of {checked[name]} questions stand word for word in the training text of {name}, so "
                    "a score on them is no measure of ability. Take them out of either",
                ))  # fmt: skip
        numbers = {
            name: {"checked": count, "found": sum(row["domain"] == name for row in rows)}
            for name, count in checked.items()
        }
        write_json(out / NUMBERS, numbers)
        write_rows(out / ROWS, rows)
        return {"found": len(rows)}

    def numbers(self) -> dict[str, Any]:
        """Items that were looked for and items found, by domain."""
        found: dict[str, Any] = json.loads((self.folder / NUMBERS).read_text(encoding="utf-8"))
        return found
