"""Sparse upcycling (arXiv 2212.05055): copies of the seed's feed-forward blocks as experts, trained together.

It is BTX without branches: the same class, router, data and number of tokens, but no separately trained experts. With
`reinitialize` it is Drop-Upcycling (arXiv 2502.19261).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from btx.conversions.contract import Conversion, spends_at_once
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Model, Sources, Start
from btx.merge.layout import layout
from btx.recipe.fields import Count, Share
from btx.recipe.merge_settings import MergeSettings
from btx.recipe.mixing import shares_in_all
from btx.recipe.recipe import Recipe, Section, require_whole_batches
from btx.recipe.settings import FinetuneSettings
from btx.steps.finetune import Finetune
from btx.steps.merge import SEED, Merge


class UpcycleSettings(FinetuneSettings, Section):
    """Sparse upcycling of the seed on as many tokens as BTX takes; defaults are those of train and finetune."""

    tokens: Count | None = Field(  # type: ignore[assignment]
        None, description="default: the tokens of the experts trained here and of the finetuning together"
    )
    experts: Annotated[Count, Field(ge=2)] | None = Field(None, description="default: as many as the merge makes")
    router: Literal["random", "orthogonal"] = "random"
    reinitialize: Share = Field(0.0, description="share of each copy's hidden units reinitialised (Drop-Upcycling)")

    def fits(self, recipe: Recipe, name: str) -> None:
        """Require known domains, whole batches, and no more experts per token than copies."""
        recipe.require_domains(f"{name}.mix", self.mix)
        said, copies = recipe.filled(self), self.copies(recipe)
        require_whole_batches(f"{name}, with what it takes from train", said)
        if (said.experts_per_token or 1) > copies:
            raise ValueError(f"{name}.top_k is {said.top_k}, but there are {copies} copies; choose 1 to {copies}")

    def copies(self, recipe: Recipe) -> int:
        """The number of experts."""
        return self.experts or len(recipe.merge.owners(recipe.models))

    def laid_out(self, recipe: Recipe) -> MergeSettings:
        """The merge settings that make the copies."""
        return MergeSettings(
            copies=self.copies(recipe), router=self.router, reinitialize=self.reinitialize, seed=recipe.merge.seed,
            dtype=recipe.merge.dtype,
        )  # fmt: skip


class Upcycle(Merge):
    """A Mixture of Experts whose experts are copies of the seed."""

    kind: ClassVar[str] = "upcycle"


class Upcycled(Finetune):
    """The upcycled model, trained."""

    kind: ClassVar[str] = "upcycled"
    section: ClassVar[str] = "upcycle"


def build(sources: Sources, start: Start, _experts: Experts, settings: UpcycleSettings) -> dict[str, Model]:
    """The trained upcycled model."""
    recipe, tokens = sources.recipe, sources.all_data(start)
    copies = settings.laid_out(recipe)
    merge = sources.add(Upcycle(branch=start.branch, descent=None, experts={}, settings=copies, **sources.place()))
    shares = shares_in_all(recipe, list(tokens), settings.mix, "upcycle.mix")
    filled = recipe.filled(settings)
    said = {name: getattr(filled, name) for name in FinetuneSettings.model_fields}
    said |= {"tokens": settings.tokens or recipe.tokens_in_all, "mix": {}}
    step = sources.add(
        Upcycled(merge=merge, tokens=tokens, weights=shares, settings=FinetuneSettings(**said), **sources.place())
    )
    return {"upcycled": Model(step, step.settings.rule)}


def plan(recipe: Recipe, settings: UpcycleSettings, seed: Config) -> list[Training]:
    """The one training of the copies."""
    copies, filled = layout(settings.laid_out(recipe), [SEED], seed, "the seed"), recipe.filled(settings)
    config = copies.config(seed, filled.experts_per_token, "the seed")
    return [Training("upcycled", config.to_dict(), settings.tokens or recipe.tokens_in_all, filled)]


CONVERSION = Conversion(
    build,
    models=("upcycled",),
    section=UpcycleSettings,
    plan=plan,
    rates=("upcycle.learning_rate",),
    spend=spends_at_once("upcycle"),
)
