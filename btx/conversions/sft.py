"""Supervised finetuning of the dense seed on instructions, and its controls, which change what an instruction says.

The loss is on the answers alone. A control trains on the same items with their instructions changed
(`btx/data/instructions.py`, after arXiv 2305.11383); tasks of kind `label` then tell compliance, the share of answers
that are labels at all, from accuracy among the compliant, beside a random guess. What a task asks is not trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import Field, model_validator

from btx.conversions.contract import Conversion
from btx.conversions.dense import Dense
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Branch, Model, Sources, Start
from btx.data import corpus
from btx.data.instructions import InstructionSplit
from btx.errors import RecipeError
from btx.recipe.compare_settings import Arm
from btx.recipe.fields import Count, Text, execution
from btx.recipe.makers import Maker
from btx.recipe.recipe import Recipe, Section, require_whole_batches
from btx.recipe.settings import TrainSettings
from btx.recipe.task_settings import Control
from btx.steps.model import ModelStep
from btx.steps.tokens import TokensStep

if TYPE_CHECKING:
    from btx.data.encoder import Encoder

DRAWN = ("delusive", "shuffled")  # controls that draw from the seed


class SftSettings(TrainSettings, Section):
    """Supervised finetuning on instructions, the loss on answers alone; what it does not say is as in train."""

    data: list[Text] = execution(
        ..., min_length=1, description="items with instruction, input, output and, where known, labels, task, examples"
    )
    control: Control = Field("original", description="how the instructions that are trained on are changed")
    controls: list[Control] = Field(
        default_factory=list, description="further controls, trained alike, as models of the same report"
    )
    chat: bool = Field(
        False, description="write items in the tokenizer's chat template, as a user's message and answer"
    )
    tokens: Count | None = Field(
        None, description="default: the tokens of the experts trained here and of the finetuning together"
    )

    @model_validator(mode="after")
    def _whole_batch(self) -> SftSettings:
        return self  # unset fields come from `train`, so `fits` checks the two together

    def fits(self, recipe: Recipe, name: str) -> None:
        """Require whole batches, and each control once."""
        require_whole_batches(f"{name}, with what it takes from train", recipe.filled(self))
        every = [self.control, *self.controls]
        if len(set(every)) < len(every):
            raise ValueError(f"{name}.controls are those beside {name}.control ({self.control}); name each once")


class InstructionTokens(TokensStep):
    """The tokens of instructions as a control has them, with a loss on answers alone."""

    kind: ClassVar[str] = "instructions"
    version: ClassVar[int] = 1
    control: Control
    seed: int  # of what the control draws
    chat: bool

    def split(self) -> InstructionSplit:
        """The items, split into training and held-out alike under every control."""
        return InstructionSplit(
            self.sources, self.data, apart=self.apart, control=self.control, seed=self.seed, chat=self.chat
        )

    def encoder(self) -> Encoder:
        """The encoder; RecipeError for `chat` without a template."""
        found = super().encoder()
        if self.chat and not found.tokenizer.chat_template:
            raise RecipeError("sft.chat is true, and the tokenizer has no chat template. Leave `chat` out.")
        return found


class Sft(Dense):
    """A dense checkpoint of the seed's shape."""

    kind: ClassVar[str] = "sft"
    section: ClassVar[str] = "sft"


def expert(sources: Sources, start: Start, branch: Branch, settings: SftSettings) -> ModelStep:
    """A domain's expert: the seed, finetuned on instructions."""
    return _finetuned(sources, start, branch.name, settings.model_copy(update={"tokens": branch.tokens}))


def expert_plan(settings: SftSettings, seed: Config, name: str, tokens: int) -> Training:
    """A training of the seed's shape."""
    return Training(f"sft:{name}", seed, tokens, settings)


def _finetuned(
    sources: Sources, start: Start, name: str | None, settings: SftSettings, control: Control | None = None
) -> ModelStep:
    """The seed, finetuned on instructions; `name` is the step's."""
    recipe, control = sources.recipe, control or settings.control
    said = recipe.filled(settings).model_dump(include=set(TrainSettings.model_fields))
    tokens = sources.add(InstructionTokens(
        tokenizer=start.tokenizer, control=control, seed=said["seed"] if control in DRAWN else 0, chat=settings.chat,
        **_reads(sources, settings), **sources.place(name),
    ))  # fmt: skip
    return sources.add(Sft(
        branch=start.branch, tokens={"sft": tokens}, weights={"sft": 1.0},
        budget=settings.tokens or recipe.tokens_in_all, train=TrainSettings(**said), **sources.place(name),
    ))  # fmt: skip


def _reads(sources: Sources, settings: SftSettings) -> dict[str, Any]:
    """What the tokens step records of its files, and of those of tasks of kind label, whose items it leaves out."""
    base, notes = sources.texts.base, list[str]()
    files = corpus.resolve(settings.data, base, "sft.data", notes)
    asked = {
        file
        for name, task in sources.recipe.tasks.items() if task.kind == "label"
        for file in corpus.resolve([task.file], base, f"tasks.{name}.file")
    }  # fmt: skip
    content = [corpus.digest(file, sources.digests) for file in (*files, *sorted(asked))]
    data = sources.recipe.data.model_copy(update={"loss_mask": "completion"})
    notes += corpus.equal_files(files, content, "sft.data")
    return {"sources": files, "valid": [], "apart": sorted(asked), "beside": [], "content": content, "data": data,
            "notes": notes}  # fmt: skip


def build(sources: Sources, start: Start, _experts: Experts, settings: SftSettings) -> dict[str, Model]:
    """The finetuned seed, and those of the further controls."""
    others = {_named(control): Model(_finetuned(sources, start, control, settings, control))
              for control in settings.controls}  # fmt: skip
    return {**others, "sft": Model(_finetuned(sources, start, None, settings))}


def _named(control: Control) -> str:
    return f"sft-{control}"


def plan(recipe: Recipe, settings: SftSettings, seed: Config) -> list[Training]:
    """A training of the seed's shape for every control."""
    labels = [*(f"sft:{control}" for control in settings.controls), "sft"]
    return [Training(label, seed, settings.tokens or recipe.tokens_in_all, recipe.filled(settings)) for label in labels]


def spend(_recipe: Recipe, tokens: int, _arm: Arm) -> dict[str, Any]:
    """Settings under which it takes so many tokens; an arm trains its own control alone."""
    return {"sft.tokens": tokens, "sft.controls": []}


CONVERSION = Conversion(
    build,
    models=(*map(_named, get_args(Control)), "sft"),
    section=SftSettings,
    plan=plan,
    rates=("sft.learning_rate",),
    spend=spend,
    maker=Maker(section=SftSettings, build=expert, plan=expert_plan, apart=("tokens", "controls")),
)
