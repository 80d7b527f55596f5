"""Sparse upcycling (arXiv 2212.05055): copies of the seed's feed-forward blocks as experts, trained together.

It is BTX without branches: the same class, router, data and number of tokens, and no expert that is trained apart. With
`reinitialize` it is Drop-Upcycling (arXiv 2502.19261).
"""

from __future__ import annotations

from typing import ClassVar

from btx.conversions.sources import Sources, Start
from btx.recipe.mixing import shares_in_all
from btx.recipe.settings import FinetuneSettings
from btx.steps.finetune import Finetune
from btx.steps.merge import Merge


class Upcycle(Merge):
    """A Mixture of Experts whose experts are copies of the seed."""

    kind: ClassVar[str] = "upcycle"


class Upcycled(Finetune):
    """The same, trained."""

    kind: ClassVar[str] = "upcycled"
    section: ClassVar[str] = "upcycle"


def build(sources: Sources, start: Start) -> Upcycled | None:
    """The trained copies, where the recipe asks for them."""
    recipe = sources.recipe
    settings = recipe.upcycling
    if settings is None:
        return None
    tokens = sources.all_data(start)
    merge = sources.add(
        Upcycle(branch=start.branch, descent=None, experts={}, settings=recipe.copying, **sources.place())
    )
    shares = shares_in_all(recipe, list(tokens), "upcycle")
    said = {name: getattr(settings, name) for name in FinetuneSettings.model_fields}
    said |= {"tokens": settings.tokens or recipe.tokens_in_all, "mix": {}}
    return sources.add(
        Upcycled(merge=merge, tokens=tokens, weights=shares, settings=FinetuneSettings(**said), **sources.place())
    )
