"""The dense average of all experts (and the seed)."""

from __future__ import annotations

from btx.conversions.experts import Experts
from btx.conversions.sources import Sources, Start
from btx.steps.merge import Average


def build(sources: Sources, start: Start, experts: Experts) -> Average:
    """The averaged model."""
    settings = sources.recipe.merge.averaging
    return sources.add(Average(settings=settings, **experts.fields(start), **sources.place()))
