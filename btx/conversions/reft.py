"""LoReFT (arXiv 2404.03592): the seed stays as it is, and edits of its residual stream are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from btx.conversions.contract import Conversion, spends_at_once
from btx.conversions.dense import DenseSettings
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Model, Sources, Start
from btx.errors import RecipeError
from btx.events import Emit
from btx.recipe.fields import Count, Whole
from btx.recipe.mixing import shares_in_all
from btx.recipe.recipe import Recipe
from btx.recipe.settings import Settings, TrainSettings
from btx.steps.continued import Continued
from btx.steps.given import ExternalCheckpoint
from btx.steps.model import ComposedStep
from btx.training.hook import TrainingHook

if TYPE_CHECKING:
    from torch import Tensor

    from btx.models.opened import Opened

SEED, FILE = "seed", "reft.safetensors"


class ReftSettings(DenseSettings):
    """LoReFT: low-rank edits of the frozen seed's residual stream, trained on the data of the whole conversion; what it
    does not say is as in train, but for weight decay, which would pull the edits away from the seed."""

    weight_decay: float = Field(0.0, ge=0)
    rank: Count = Field(4, description="dimensions of the subspace that is edited after each layer")
    layers: list[Whole] | Literal["all"] = Field("all", description="after which layers, from 0")
    positions: Literal["all", "prompt"] = Field(
        "all", description="which are edited; prompt: the first and the last tokens of each prompt, as in the paper, "
        "which needs data.loss_mask: completion to tell prompts"
    )  # fmt: skip
    prefix: Whole = Field(5, description="tokens at the beginning of a prompt")
    suffix: Whole = Field(5, description="tokens at its end")

    def fits(self, recipe: Recipe, name: str) -> None:
        """As the control; prompts that can be told, and something that is edited."""
        super().fits(recipe, name)
        if self.positions == "prompt" and recipe.data.loss_mask != "completion":
            raise ValueError(f"{name}.positions: prompt needs data.loss_mask: completion, which tells prompts apart")
        if (self.positions == "prompt" and not self.prefix + self.suffix) or self.layers == []:
            raise ValueError(f"{name} edits nothing; give it layers, and a prefix or a suffix")
        if recipe.seed.is_builtin:
            self.at(recipe.seed.builtin.layers, recipe.seed.builtin.hidden_size, name)

    def at(self, layers: int, width: int, name: str = "reft") -> list[int]:
        """The layers, in order; ValueError for one that there is not, or a rank above the hidden width."""
        found = sorted({*self.layers}) if self.layers != "all" else list(range(layers))
        if found[-1] >= layers:
            raise ValueError(f"{name}.layers names {found[-1]}, but the seed has layers 0 to {layers - 1}")
        if self.rank > width:
            raise ValueError(f"{name}.rank is {self.rank}, above the seed's hidden width {width}")
        return found


class ReftRule(Settings):
    """Where the edits act; without prefix and suffix everywhere."""

    rank: int
    layers: list[int] | None  # None: all
    prefix: int | None
    suffix: int | None


class Reft(Continued, ComposedStep):
    """Names the seed, and keeps R, W and b of every edited layer beside."""

    kind: ClassVar[str] = "reft"
    section: ClassVar[str] = "reft"
    shards: ClassVar[bool] = False
    settings: ReftRule

    def check(self, asked: int) -> None:
        """RecipeError for layers or a rank that the seed has not, sequences that are too long, or shards."""
        super().check(asked)
        if isinstance(self.branch.seed, ExternalCheckpoint):
            from btx.checkpoints.validate import read_config
            from btx.models.native import native_config

            native = native_config(read_config(self.branch.seed.folder), "the seed")
            self._layers(native.num_hidden_layers, native.hidden_size)

    def _layers(self, layers: int, width: int) -> list[int]:
        said = ReftSettings(layers="all" if self.settings.layers is None else self.settings.layers,
                            rank=self.settings.rank)  # fmt: skip
        try:
            return said.at(layers, width)
        except ValueError as error:
            raise RecipeError(f"{error}. Correct it.") from error

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train the edits, and write them and the file that names the seed."""
        facts = self.fitted(out, work, emit, prepare=self._prepare, publish=_publish)
        return {**facts, **ComposedStep.run(self, out, work, emit)}

    def _prepare(self, net: Any, stream: Any) -> TrainingHook:
        layers = self._layers(net.config.num_hidden_layers, net.config.hidden_size)
        return Editing(net, stream, self.settings, layers)

    @classmethod
    def compose(cls, folder: Path, settings: ReftRule, parts: dict[str, Opened]) -> Opened:
        """The seed with its edits."""
        from safetensors.torch import load

        from btx.models.opened import Stock
        from btx.models.reft import PARTS, Intervened

        found = load((folder / FILE).read_bytes())
        layers = {int(name.partition(".")[0]) for name in found}
        seed = parts[SEED]
        assert isinstance(seed, Stock)
        tensors: Any = {n: tuple(found[f"{n}.{part}"] for part in PARTS) for n in sorted(layers)}
        return Intervened(seed.net, tensors, prefix=settings.prefix, suffix=settings.suffix)


class Editing(TrainingHook):
    """The hook of the training: the seed frozen, edits after its layers, and where they act in each pass."""

    def __init__(self, net: Any, stream: Any, rule: ReftRule, layers: list[int]) -> None:
        from torch import nn

        from btx.models.reft import Edits, Intervention

        for parameter in net.parameters():
            parameter.requires_grad_(False)
        made = {n: Intervention(net.config.hidden_size, rule.rank) for n in layers}
        net.reft = nn.ModuleDict({str(n): one for n, one in made.items()})
        self.stream, self.rule = stream, rule
        self.edits = Edits(net, made, everywhere=rule.prefix is None)

    def sequences(self, numbers: range, length: int) -> None:
        """Find the prompts of the sequences."""
        from btx.models.reft import chosen

        if self.rule.prefix is not None and self.rule.suffix is not None:
            places = self.stream.prompts(numbers)
            self.edits.where = chosen(places, prefix=self.rule.prefix, suffix=self.rule.suffix)


def _publish(net: Any, _state: Mapping[str, Tensor], out: Path) -> None:
    from safetensors.torch import save_file

    from btx.models.reft import PARTS

    named = {
        f"{n}.{part}": tensor.detach().clone().cpu().contiguous()
        for n, one in net.reft.items() for part, tensor in zip(PARTS, one.tensors, strict=True)
    }  # fmt: skip
    save_file(named, out / FILE)


def build(sources: Sources, start: Start, _experts: Experts, settings: ReftSettings) -> dict[str, Model]:
    """The edited seed."""
    recipe, tokens = sources.recipe, sources.all_data(start)
    prompts = settings.positions == "prompt"
    rule = ReftRule(
        rank=settings.rank, layers=None if settings.layers == "all" else sorted({*settings.layers}),
        prefix=settings.prefix if prompts else None, suffix=settings.suffix if prompts else None,
    )  # fmt: skip
    step = sources.add(Reft(
        parts={SEED: start.seed}, settings=rule, branch=start.branch, tokens=tokens,
        weights=shares_in_all(recipe, list(tokens), settings.mix, "reft.mix"),
        budget=settings.tokens or recipe.tokens_in_all, train=_training(recipe, settings), **sources.place(),
    ))  # fmt: skip
    return {"reft": Model(step)}


def _training(recipe: Recipe, settings: ReftSettings) -> TrainSettings:
    filled = recipe.filled(settings)
    said = {name: getattr(filled, name) for name in TrainSettings.model_fields}
    return TrainSettings(**{**said, "weight_decay": settings.weight_decay})


def plan(recipe: Recipe, settings: ReftSettings, seed: Config) -> list[Training]:
    """The training, which computes the seed forwards and backwards."""
    return [Training("reft", seed, settings.tokens or recipe.tokens_in_all, _training(recipe, settings))]


CONVERSION = Conversion(
    build,
    models=("reft",),
    section=ReftSettings,
    plan=plan,
    rates=("reft.learning_rate",),
    spend=spends_at_once("reft"),
)
