"""A model's score on one task: its completions of local items, judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from btx.events import Emit, Note, Progress
from btx.graph.artifact import fingerprint, read_manifest, write_json
from btx.graph.step import Step
from btx.recipe.fields import environment, execution
from btx.recipe.settings import RoutingRule
from btx.recipe.task_settings import TaskSettings
from btx.steps.measure import NUMBERS, ROWS, read_rows, twin_of, write_rows
from btx.steps.model import ModelStep

if TYPE_CHECKING:
    from btx.tasks.items import Item


class Solve(Step):
    """A report folder: numbers.json, and rows.parquet with a row per item."""

    kind: ClassVar[str] = "task"
    version: ClassVar[int] = 1
    model: ModelStep
    task: TaskSettings
    content: list[str]  # digests of the items' file, and of the examples' if there are any
    file: str = execution("")
    examples: str | None = execution(None)
    date: str | None = None  # for a chat template that asks for today's
    precision: str
    batch_tokens: int = environment(8192)  # of prompts and completions that are generated at once
    rule: RoutingRule | None = None  # of a Mixture of Experts

    def check(self, asked: int) -> None:
        """Read the items; RecipeError for a bad one, or one too long for a model that is there; for code, canaries."""
        items = self.items()
        if self.task.kind == "code":
            from btx.tasks.canaries import require

            require()
        if (self.model.folder / "config.json").is_file():
            from btx.checkpoints.validate import read_config

            self._prompts(items, read_config(self.model.folder).get("max_position_embeddings"))

    def items(self) -> list[Item]:
        """The items, in the file's order."""
        from btx.tasks.answers import require_answers
        from btx.tasks.items import read_items

        found = read_items(self.task, self.file, self.examples)
        require_answers(self.task, found)
        return found

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Generate, judge and write, or copy an earlier result of the same bytes."""
        about = fingerprint([
            self.model.digest, self.task.identity(), self.content, self.date, self.precision,
            self.rule.identity() if self.rule else None,
        ])  # fmt: skip
        if twin := twin_of(self, about):
            emit(Note(self.label, f"same model as in {read_manifest(twin)['step']}: its result is copied"))
            for file in (NUMBERS, ROWS):
                shutil.copyfile(twin / file, out / file)
            return {"measured": about}
        from btx.tasks.solve import numbers_of, rows_of

        items = self.items()
        made = self._complete(items, emit)

        def judged(count: int) -> None:
            if self.task.kind == "code":  # a sign of life, since each program may take its time
                emit(Progress(self.label, count, len(items), "programs"))

        rows = rows_of(items, made, self.task, judged)
        write_json(out / NUMBERS, numbers_of(rows))
        write_rows(out / ROWS, rows)
        return {"measured": about}

    def numbers(self) -> dict[str, Any]:
        """The published numbers."""
        found: dict[str, Any] = json.loads((self.folder / NUMBERS).read_text(encoding="utf-8"))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The published rows, one per item."""
        return read_rows(self.folder)

    def _complete(self, items: list[Item], emit: Emit) -> list[Any]:
        import torch

        from btx.data.encoder import load_tokenizer
        from btx.tasks.solve import complete, end_ids

        tokenizer = load_tokenizer(self.model.folder)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        with self.model.open(where=self.where, dtype=dtype, rule=self.rule) as model:
            return complete(
                model, tokenizer, self._prompts(items, model.positions), most=self.task.max_new_tokens,
                stops=self.task.stops, end=end_ids(self.model.folder, tokenizer), batch_tokens=self.batch_tokens,
                done=lambda count: emit(Progress(self.label, count, len(items), "items")),
            )  # fmt: skip

    def _prompts(self, items: list[Item], positions: int | None) -> list[list[int]]:
        from btx.data.encoder import Encoder, load_tokenizer
        from btx.tasks.solve import prompts_of, require_room

        prompts = prompts_of(Encoder(load_tokenizer(self.model.folder), "all", date=self.date), items, self.task)
        require_room(prompts, self.task.max_new_tokens, positions, self.label)
        return prompts
