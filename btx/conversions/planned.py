"""A training that is going to be done, for whoever says beforehand what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx.checkpoints.hub import described
from btx.checkpoints.validate import read_config
from btx.errors import RecipeError
from btx.recipe.recipe import Recipe
from btx.recipe.settings import TrainSettings

Config = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """A training by its model's config, its tokens and its settings."""

    label: str
    config: Config
    tokens: int
    settings: TrainSettings


def seed_config(recipe: Recipe, base: Path) -> Config:
    """The seed's config: of the builtin seed, from its folder, or from seed.architecture; RecipeError without any."""
    if recipe.seed.is_builtin:
        return recipe.seed.builtin.config
    folder = described(recipe.seed.checkpoint, base, "seed.checkpoint")
    if (folder / "config.json").is_file():
        return read_config(folder)
    if recipe.seed.architecture:
        return recipe.seed.architecture
    raise RecipeError(
        f"seed.checkpoint: there is no folder {folder}. Put the checkpoint there, or state its config.json "
        "under seed.architecture to plan without it."
    )
