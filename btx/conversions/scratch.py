"""Training from scratch: the shape of the seed, or of a mixture of its copies, from random weights.

What a conversion costs is told against it: with the conversion's own budget, or with the seed's pretraining tokens
besides. It sees the new data from its first token on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from btx.conversions.contract import Conversion, spends_at_once
from btx.conversions.dense import Dense
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Model, Sources, Start
from btx.conversions.upcycle import Upcycle
from btx.events import Emit
from btx.merge.layout import layout
from btx.recipe.fields import Count
from btx.recipe.merge_settings import MergeSettings
from btx.recipe.mixing import shares_in_all
from btx.recipe.recipe import Recipe, Section, require_whole_batches
from btx.recipe.settings import FinetuneSettings, TrainSettings
from btx.steps.finetune import Finetune
from btx.steps.merge import SEED
from btx.steps.train import fit


class ScratchSettings(FinetuneSettings, Section):
    """Training from random weights; what it does not say is as in train and finetune."""

    shape: Literal["dense", "moe"] = Field("dense", description="of the seed, or of the mixture that copies of it make")
    tokens: Count | None = Field(  # type: ignore[assignment]
        None, description="default: what the experts trained here and the finetuning take together"
    )
    experts: Annotated[Count, Field(ge=2)] | None = Field(None, description="moe; default: as many as the merge makes")

    def fits(self, recipe: Recipe, name: str) -> None:
        """Domains that there are, and whole batches."""
        recipe.require_domains(f"{name}.mix", self.mix)
        require_whole_batches(f"{name}, with what it takes from train", recipe.filled(self))

    def laid_out(self, recipe: Recipe) -> MergeSettings:
        """The shape of the mixture."""
        copies = self.experts or len(recipe.merge.owners(recipe.models))
        return MergeSettings(copies=copies, router="random", seed=recipe.merge.seed, dtype=recipe.merge.dtype)


class Scratch(Dense):
    """A dense checkpoint of the seed's shape and tokenizer, and nothing of its weights."""

    kind: ClassVar[str] = "scratch"
    section: ClassVar[str] = "scratch"

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train and save."""
        from btx.checkpoints.validate import read_config
        from btx.models.native import native_config

        seed = self.branch.seed.folder
        return fit(
            self, config=native_config(read_config(seed), str(seed)), like=seed, tokens=self.tokens,
            weights=self.weights, budget=self.budget, settings=self.train, out=out, work=work, emit=emit,
        )  # fmt: skip


class ScratchMixture(Finetune):
    """A Mixture of Experts of the shape of copies of the seed, trained from random weights."""

    kind: ClassVar[str] = "scratch-moe"
    section: ClassVar[str] = "scratch"
    fresh: ClassVar[bool] = True


def build(sources: Sources, start: Start, _experts: Experts, settings: ScratchSettings) -> dict[str, Model]:
    """The model trained from scratch."""
    recipe, tokens = sources.recipe, sources.all_data(start)
    filled = recipe.filled(settings)
    budget = settings.tokens or recipe.tokens_in_all
    shares = shares_in_all(recipe, list(tokens), settings.mix, "scratch.mix")
    if settings.shape == "dense":
        train = TrainSettings(**{name: getattr(filled, name) for name in TrainSettings.model_fields})
        step = sources.add(Scratch(
            branch=start.branch, tokens=tokens, weights=shares, budget=budget, train=train, **sources.place()
        ))  # fmt: skip
        return {"scratch": Model(step)}
    shape = sources.add(Upcycle(
        branch=start.branch, descent=None, experts={}, settings=settings.laid_out(recipe), **sources.place("shape")
    ))  # fmt: skip
    said = {name: getattr(filled, name) for name in FinetuneSettings.model_fields} | {"tokens": budget, "mix": {}}
    mixture = sources.add(ScratchMixture(
        merge=shape, tokens=tokens, weights=shares, settings=FinetuneSettings(**said), **sources.place()
    ))  # fmt: skip
    return {"scratch": Model(mixture, mixture.settings.rule)}


def plan(recipe: Recipe, settings: ScratchSettings, seed: Config) -> list[Training]:
    """The training from scratch."""
    filled, tokens = recipe.filled(settings), settings.tokens or recipe.tokens_in_all
    if settings.shape == "dense":
        return [Training("scratch", seed, tokens, filled)]
    copies = layout(settings.laid_out(recipe), [SEED], seed, "the seed")
    config = copies.config(seed, filled.experts_per_token, "the seed")
    return [Training("scratch", config.to_dict(), tokens, filled)]


CONVERSION = Conversion(
    build, models=("scratch",), section=ScratchSettings, plan=plan, rates=("scratch.learning_rate",),
    spend=spends_at_once("scratch"),
)  # fmt: skip
