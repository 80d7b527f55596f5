"""The control: the dense seed, continued on the data and the tokens of the whole conversion."""

from __future__ import annotations

from btx.conversions.sources import Sources, Start
from btx.recipe.mixing import shares_in_all
from btx.recipe.settings import DenseSettings, TrainSettings
from btx.steps.dense import Dense


def build(sources: Sources, start: Start) -> Dense | None:
    """The continued seed, where the recipe asks for it."""
    recipe = sources.recipe
    settings = recipe.continuing
    if settings is None:
        return None
    tokens = sources.all_data(start)
    said = settings.model_dump(exclude=set(DenseSettings.model_fields) - set(TrainSettings.model_fields))
    shares = shares_in_all(recipe, list(tokens), "dense")
    return sources.add(Dense(
        branch=start.branch, tokens=tokens, weights=shares, budget=settings.tokens or recipe.tokens_in_all,
        train=TrainSettings(**said), **sources.place(),
    ))  # fmt: skip
