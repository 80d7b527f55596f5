"""The interface of a conversion: a module of this folder whose `CONVERSION` builds its models from a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from btx.conversions.experts import Experts
from btx.conversions.sources import Model, Sources, Start
from btx.recipe.recipe import Recipe, Section
from btx.recipe.settings import TrainSettings

Config = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """A training that a conversion will run, for the plan: its model's config and its tokens."""

    label: str
    config: Config
    tokens: int
    settings: TrainSettings


def no_training(_recipe: Recipe, _settings: Any, _seed: Config) -> list[Training]:
    """The plan of a conversion that trains nothing."""
    return []


@dataclass(frozen=True)
class Conversion:
    """One conversion.

    `build` adds steps to the graph and returns the models by their report names, which `models` lists. With a
    `section`, the conversion runs only if the recipe has a key of the module's name, whose settings `build` and `plan`
    get. Without one, it always runs.
    """

    build: Callable[[Sources, Start, Experts, Any], dict[str, Model]]
    models: tuple[str, ...]
    section: type[Section] | None = None
    plan: Callable[[Recipe, Any, Config], list[Training]] = no_training
