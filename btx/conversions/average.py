"""The dense average of all experts (and the seed)."""

from __future__ import annotations

from btx.conversions.contract import Conversion
from btx.conversions.experts import Experts, plan, spend
from btx.conversions.sources import Model, Sources, Start
from btx.steps.merge import Average


def build(sources: Sources, start: Start, experts: Experts, _settings: None) -> dict[str, Model]:
    """The averaged model."""
    settings = sources.recipe.merge.averaging
    step = sources.add(Average(settings=settings, **experts.fields(start), **sources.place()))
    return {"average": Model(step, tokens=experts.domains_merged(sources, start))}


CONVERSION = Conversion(build, models=("average",), plan=plan, rates=("train.learning_rate",), spend=spend)
