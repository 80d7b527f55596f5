"""The steps that score models on a recipe's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btx.conversions.sources import Model, Sources, Start
from btx.data import corpus
from btx.errors import RecipeError
from btx.steps.overlap import Overlap
from btx.steps.solve import Solve
from btx.steps.tokens import TokensStep
from btx.tasks.items import ARITHMETIC


def solved(
    sources: Sources, start: Start, models: Mapping[str, Model]
) -> tuple[dict[str, dict[str, Solve]], dict[str, Overlap]]:
    """A step per task and model, and one per task that looks for its items in the training text."""
    recipe = sources.recipe
    solves: dict[str, dict[str, Solve]] = {}
    overlaps = {}
    trained = sources.all_data(start) | {
        step.label: step
        for step in sources.steps.values()
        if isinstance(step, TokensStep) and step.kind != TokensStep.kind
    }
    for task, settings in recipe.tasks.items():
        file = items_file(sources, f"tasks.{task}.file", settings.file)
        examples = (
            None if settings.examples is None else items_file(sources, f"tasks.{task}.examples", settings.examples)
        )
        content = [corpus.digest(path, sources.digests) for path in (file, examples) if path is not None]
        said: dict[str, Any] = {"task": settings, "content": content, "file": file, "examples": examples}
        solves[task] = {
            name: sources.add(Solve(
                model=made.step, rule=made.rule, precision=recipe.evaluate.precision, date=recipe.data.date,
                batch_tokens=recipe.evaluate.batch_tokens, **said, **sources.place(f"{task}:{name}"),
            ))
            for name, made in models.items()
        }  # fmt: skip
        overlaps[task] = sources.add(Overlap(tokens=trained, **said, **sources.place(task)))
    return solves, overlaps


def items_file(sources: Sources, where: str, path: str) -> str:
    """The one file that a path names, or the name of items that are made."""
    if path == ARITHMETIC:
        return path
    found = corpus.resolve([path], sources.texts.base, where)
    if len(found) != 1 or found[0].startswith(corpus.BUILTIN):
        raise RecipeError(
            f"{where}: {path} must name one file, and names {len(found)}: {', '.join(found[:3])}. Name one."
        )
    return found[0]
