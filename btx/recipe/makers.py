"""The ways to make a domain's expert, each with settings of its own: `train`, or a conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from btx.recipe.settings import Settings, TrainSettings


@dataclass(frozen=True)
class Maker:
    """One way. Its result is a dense checkpoint of the seed's shape, which a merge takes as it takes any other.

    `section` is the class of its settings, those `apart` aside, which one expert has not; where it is a training's,
    unset fields are those of `train`. `build(sources, start, branch, settings)` adds the steps and returns the last;
    `plan(settings, seed, name, tokens)` is what is trained, given the seed's config.
    """

    section: type[Settings]
    build: Callable[..., Any]
    plan: Callable[..., Any]
    apart: tuple[str, ...] = ()


def training_of(settings: Any) -> TrainSettings:
    """The settings of its training, or what is like them: of a step's tokens, say."""
    found: TrainSettings = settings if isinstance(settings, TrainSettings) else settings.training
    return found
