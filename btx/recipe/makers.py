"""The ways to make a domain's expert, each with settings of its own: `train`, or a conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from btx.recipe.settings import TrainSettings


@dataclass(frozen=True)
class Maker:
    """One way. Its result is a dense checkpoint of the seed's shape, which a merge takes as it takes any other.

    `section` is the class of its settings, whose unset fields are those of `train`. `build(sources, start, branch,
    settings)` adds the steps and returns the last one; `plan(settings, seed, name, tokens)` is what is trained, given
    the seed's config.
    """

    section: type[TrainSettings]
    build: Callable[..., Any]
    plan: Callable[..., Any]


APART = ("tokens", "mix", "sample", "top_k")  # settings of a section that one expert has not
