"""The mandatory control: continued pretraining of the dense seed on the data and tokens of the whole conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from btx.conversions.contract import Conversion, spends_at_once
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Model, Sources, Start
from btx.events import Emit
from btx.recipe.fields import Count, Weight
from btx.recipe.mixing import shares_in_all
from btx.recipe.recipe import Recipe, Section, require_whole_batches
from btx.recipe.settings import TrainSettings
from btx.steps.continued import Continued


class DenseSettings(TrainSettings, Section):
    """The control: continued pretraining of the dense seed on as many tokens as BTX takes; defaults are train's."""

    tokens: Count | None = Field(
        None, description="default: the tokens of the experts trained here and of the finetuning together"
    )
    mix: dict[str, Weight] = Field(
        default_factory=dict, description="as finetune.mix; default: the shares of both stages together"
    )

    @model_validator(mode="after")
    def _whole_batch(self) -> DenseSettings:
        return self  # unset fields come from `train`, so `fits` checks the two together

    def fits(self, recipe: Recipe, name: str) -> None:
        """Require known domains and whole batches."""
        recipe.require_domains(f"{name}.mix", self.mix)
        require_whole_batches(f"{name}, with what it takes from train", recipe.filled(self))


class Dense(Continued):
    """A dense checkpoint of the seed's shape."""

    kind: ClassVar[str] = "dense"
    section: ClassVar[str] = "dense"

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train and save."""
        return self.fitted(out, work, emit)


def build(sources: Sources, start: Start, _experts: Experts, settings: DenseSettings) -> dict[str, Model]:
    """The continued seed."""
    recipe, tokens = sources.recipe, sources.all_data(start)
    said = recipe.filled(settings).model_dump(include=set(TrainSettings.model_fields))
    step = sources.add(Dense(
        branch=start.branch, tokens=tokens, weights=shares_in_all(recipe, list(tokens), settings.mix, "dense.mix"),
        budget=settings.tokens or recipe.tokens_in_all, train=TrainSettings(**said), **sources.place(),
    ))  # fmt: skip
    return {"dense": Model(step)}


def plan(recipe: Recipe, settings: DenseSettings, seed: Config) -> list[Training]:
    """The training of the seed's shape."""
    return [Training("dense", seed, settings.tokens or recipe.tokens_in_all, recipe.filled(settings))]


CONVERSION = Conversion(
    build,
    models=("dense",),
    section=DenseSettings,
    plan=plan,
    rates=("dense.learning_rate",),
    spend=spends_at_once("dense"),
)
