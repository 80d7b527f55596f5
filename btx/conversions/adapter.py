"""Adapters: the frozen seed with LoRA (arXiv 2106.09685), DoRA (2402.09353) or any method of the library peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from btx.conversions.contract import Conversion, spends_at_once
from btx.conversions.dense import DenseSettings
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Branch, Model, Sources, Start
from btx.events import Emit
from btx.recipe.joint_settings import AdapterRule
from btx.recipe.makers import Maker
from btx.recipe.mixing import shares_in_all
from btx.recipe.recipe import Recipe
from btx.recipe.settings import TrainSettings
from btx.steps.continued import Continued
from btx.steps.model import ComposedStep, ModelStep
from btx.steps.train import OWN, require_finite

if TYPE_CHECKING:
    from btx.models.opened import Opened

SEED = "seed"


class AdapterSettings(AdapterRule, DenseSettings):
    """An adapter of the frozen seed, trained on the data of the whole conversion; defaults are those of train."""


class Adapter(Continued, ComposedStep):
    """Names the seed; the folder is an adapter of peft too, which `PeftModel.from_pretrained(seed, folder)` loads."""

    kind: ClassVar[str] = "adapter"
    section: ClassVar[str] = "adapter"
    shards: ClassVar[bool] = False
    settings: AdapterRule

    def check(self, asked: int) -> None:
        """RecipeError for a method, options or targets that peft does not take, long sequences, or shards."""
        from btx.models.flops import modules_in
        from btx.training.adapters import TARGETS, config_of, require_targets

        super().check(asked)
        config = config_of(self.settings.method, self.settings.options, "adapter")
        if TARGETS in self.settings.options:
            require_targets(config, modules_in(self.branch.seed.config), "adapter")

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train the adapter, write it and the file that names the seed, and load it again."""
        from btx.models import model
        from btx.training.adapters import Held, require_saved

        held = Held(self.settings, "adapter")
        facts = self.fitted(out, work, emit, prepare=held.prepare, publish=held.publish)
        require_saved(model.load(self.branch.seed.folder, where=self.where), out, held.logits, "adapter")
        return {**facts, **ComposedStep.run(self, out, work, emit)}

    @classmethod
    def compose(cls, folder: Path, settings: AdapterRule, parts: dict[str, Opened]) -> Opened:
        """The seed with its adapter."""
        from btx.models.opened import HIDDEN_STATES, Stock
        from btx.training.adapters import load

        seed = parts[SEED]
        assert isinstance(seed, Stock)
        load(seed.net, folder)
        found = Stock(seed.net)
        found.capabilities = frozenset({HIDDEN_STATES})
        return found


class MergedAdapter(ModelStep):
    """A dense checkpoint: what the adapter makes of the seed, by peft's own merge."""

    kind: ClassVar[str] = "adapter-merged"
    adapter: Adapter

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Merge and write."""
        from btx.checkpoints.reader import Checkpoint
        from btx.models import model
        from btx.training.adapters import merged

        seed = self.adapter.branch.seed.folder
        model.set_threads(self.where)
        net, dtype = merged(model.load(seed, where=self.where), self.adapter.folder), Checkpoint(seed).dtype
        require_finite(self.label, 0.0, net.state_dict(), dtype)
        model.save(out, config=net.config, state=net.state_dict(), dtype=dtype, like=seed)
        return {}


def build(sources: Sources, start: Start, _experts: Experts, settings: AdapterSettings) -> dict[str, Model]:
    """The seed with its adapter."""
    recipe, tokens = sources.recipe, sources.all_data(start)
    step = sources.add(Adapter(
        parts={SEED: start.seed}, settings=AdapterRule(method=settings.method, options=settings.options),
        branch=start.branch, tokens=tokens, weights=shares_in_all(recipe, list(tokens), settings.mix, "adapter.mix"),
        budget=settings.tokens or recipe.tokens_in_all,
        train=_training(recipe.filled(settings)), **sources.place(),
    ))  # fmt: skip
    return {"adapter": Model(step)}


def expert(sources: Sources, start: Start, branch: Branch, settings: AdapterSettings) -> MergedAdapter:
    """A domain's expert: the seed with an adapter trained on the domain, merged."""
    adapter = sources.add(Adapter(
        parts={SEED: start.seed}, settings=AdapterRule(method=settings.method, options=settings.options),
        branch=start.branch, tokens={OWN: branch.text}, weights={OWN: 1.0}, budget=branch.tokens,
        train=_training(settings), **sources.place(branch.name),
    ))  # fmt: skip
    return sources.add(MergedAdapter(adapter=adapter, **sources.place(branch.name)))


def expert_plan(settings: AdapterSettings, seed: Config, name: str, tokens: int) -> Training:
    """The training, which computes the seed forwards and backwards."""
    return Training(f"adapter:{name}", seed, tokens, settings)


def _training(settings: AdapterSettings) -> TrainSettings:
    return TrainSettings(**{name: getattr(settings, name) for name in TrainSettings.model_fields})


def plan(recipe: Recipe, settings: AdapterSettings, seed: Config) -> list[Training]:
    """The training, which computes the seed forwards and backwards."""
    return [Training("adapter", seed, settings.tokens or recipe.tokens_in_all, recipe.filled(settings))]


CONVERSION = Conversion(
    build,
    models=("adapter",),
    section=AdapterSettings,
    plan=plan,
    rates=("adapter.learning_rate",),
    spend=spends_at_once("adapter"),
    maker=Maker(section=AdapterSettings, build=expert, plan=expert_plan, apart=("tokens", "mix")),
)
