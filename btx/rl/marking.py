"""Marks the items of a task by any model in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from btx.checkpoints.reader import Checkpoint
from btx.errors import ArtifactError, RecipeError
from btx.models.opened import opened_checkpoint
from btx.recipe.fields import NAME
from btx.recipe.messages import sentences
from btx.recipe.settings import RunSettings
from btx.recipe.task_settings import TaskSettings
from btx.rl.passrate import mark
from btx.rl.sampling import Asker, seed_of
from btx.tasks.answers import require_answers
from btx.tasks.items import read_items


def marked(
    folder: Path, said: Mapping[str, Any], *, samples: int, temperature: float, seed: int, where: RunSettings,
    pattern: str, date: str | None = None, done: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A mark per item, with the digest of the model and how it was asked; an item's samples do not depend on others."""
    try:
        task = TaskSettings.model_validate(dict(said))
    except ValidationError as error:
        raise RecipeError("the task: " + "\n".join(sentences(error, TaskSettings, NAME))) from error
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"there is no checkpoint in {folder}. Name a local Hugging Face folder.")
    if task.kind == "code":
        from btx.tasks.canaries import require

        require()
    items = read_items(task, task.file, task.examples)
    require_answers(task, items)
    digest = Checkpoint(folder).digest()
    asker = Asker(folder, task, pattern, {}, temperature, date=date)
    how = {"model": digest, "temperature": temperature, "max_new_tokens": task.max_new_tokens, "chat": task.chat,
           "seed": seed}  # fmt: skip
    found = []
    with opened_checkpoint(folder, where=where) as model:
        prompts = asker.prompts(items, model.positions, "passrate")
        for n, (item, ids) in enumerate(zip(items, prompts, strict=True)):
            made = asker.sample(model, [ids] * samples, seed_of(seed, "mark", item.digest))
            found.append({**mark(item, asker.rows([item] * samples, made)), **how})
            done(n + 1, len(items))
    return found
