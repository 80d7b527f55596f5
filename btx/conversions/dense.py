"""The control: the dense seed, continued on the data and the tokens of the whole conversion."""

from __future__ import annotations

from btx.conversions.sources import Sources, Start
from btx.recipe.mixing import both_stages, mix
from btx.recipe.settings import DenseSettings, TrainSettings
from btx.steps.dense import Dense


def build(sources: Sources, start: Start) -> Dense | None:
    """The continued seed, where the recipe asks for it."""
    recipe = sources.recipe
    settings = recipe.continuing
    if settings is None:
        return None
    tokens = {name: sources.tokens(name, *files, start.tokenizer) for name, files in start.documents.items()}
    said = settings.model_dump(exclude=set(DenseSettings.model_fields) - set(TrainSettings.model_fields))
    shares = mix(recipe, list(tokens), "dense") if settings.mix else both_stages(recipe, list(tokens))
    return sources.add(Dense(
        branch=start.branch, tokens=tokens, weights=shares, budget=settings.tokens or recipe.tokens_in_all,
        train=TrainSettings(**said), **sources.place(),
    ))  # fmt: skip
