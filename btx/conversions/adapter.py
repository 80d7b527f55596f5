"""Adapters: the frozen seed with LoRA (arXiv 2106.09685), DoRA (2402.09353) or any method of the library peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from btx.conversions.contract import Conversion, spends_at_once
from btx.conversions.dense import DenseSettings
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Model, Sources, Start
from btx.errors import RecipeError
from btx.events import Emit
from btx.recipe.fields import Text
from btx.recipe.mixing import shares_in_all
from btx.recipe.recipe import Recipe
from btx.recipe.settings import Settings, TrainSettings
from btx.steps.branch import VerifySeed, require_positions
from btx.steps.model import ComposedStep, ModelStep
from btx.steps.tokens import TokensStep
from btx.steps.train import fit, memory_of, require_finite
from btx.training.hook import TrainingHook

if TYPE_CHECKING:
    from btx.models.opened import Opened

SEED = "seed"


class AdapterSettings(DenseSettings):
    """An adapter of the frozen seed, trained on the data of the whole conversion; defaults are those of train."""

    method: Text = Field("lora", description="lora, dora, or another method of peft that changes modules")
    options: dict[str, Any] = Field(
        default_factory=dict, description="of peft's config for the method: r, lora_alpha, target_modules, ..."
    )


class AdapterRule(Settings):
    """What kind of adapter it is."""

    method: str
    options: dict[str, Any]


class Adapter(ComposedStep):
    """Names the seed; the folder is an adapter of peft too, which `PeftModel.from_pretrained(seed, folder)` loads."""

    kind: ClassVar[str] = "adapter"
    trains: ClassVar[bool] = True
    settings: AdapterRule
    branch: VerifySeed
    tokens: dict[str, TokensStep]
    weights: dict[str, float]
    budget: int
    train: TrainSettings

    @property
    def needs(self) -> int:
        """At most what training the whole seed takes."""
        return memory_of(self.branch.seed.folder, self.train, self.where)

    @property
    def asks(self) -> dict[str, int]:
        """One sequence of each domain with a positive weight."""
        length = self.train.sequence_length
        return {tokens.label: length for name, tokens in self.tokens.items() if self.weights[name]}

    def check(self, asked: int) -> None:
        """RecipeError for a method or options that peft does not take, sequences that are too long, or shards."""
        from btx.training.adapters import config_of

        require_positions(self.branch.seed, "adapter.sequence_length", self.train.sequence_length)
        if self.where.launch:
            raise RecipeError(
                "adapter was not tried on shards, as run.launch may make. Leave run.launch or adapter out."
            )
        config_of(self.settings.method, self.settings.options, "adapter")

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train the adapter, write it and the file that names the seed, and load it again."""
        from btx.models import model
        from btx.training.adapters import require_saved

        seed, held = self.branch.seed.folder, Held(self.settings)
        facts = fit(
            self, folder=seed, like=seed, tokens=self.tokens, weights=self.weights, budget=self.budget,
            settings=self.train, out=out, work=work, emit=emit, prepare=held.prepare, publish=held.publish,
        )  # fmt: skip
        require_saved(model.load(seed, where=self.where), out, held.logits, "adapter")
        return {**facts, **super().run(out, work, emit)}

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


class Held:
    """peft's model between the two ends of a training."""

    def __init__(self, rule: AdapterRule) -> None:
        self.rule = rule
        self.model: Any = None
        self.logits: Any = None  # of the trained model, on a few ids

    def prepare(self, net: Any, _stream: Any) -> TrainingHook | None:
        """Put the adapter around the network."""
        from btx.training.adapters import config_of, wrapped

        self.model = wrapped(net, config_of(self.rule.method, self.rule.options, "adapter"), "adapter")
        return None

    def publish(self, net: Any, _state: Any, out: Path) -> None:
        """Write the adapter."""
        from btx.training.adapters import probed, save

        self.logits = probed(net).cpu()
        save(self.model, out)


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
    filled = recipe.filled(settings)
    step = sources.add(Adapter(
        parts={SEED: start.seed}, settings=AdapterRule(method=settings.method, options=settings.options),
        branch=start.branch, tokens=tokens, weights=shares_in_all(recipe, list(tokens), settings.mix, "adapter.mix"),
        budget=settings.tokens or recipe.tokens_in_all,
        train=TrainSettings(**{name: getattr(filled, name) for name in TrainSettings.model_fields}), **sources.place(),
    ))  # fmt: skip
    return {"adapter": Model(step)}


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
)
