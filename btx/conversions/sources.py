"""What every conversion is built from: the seed, experts from elsewhere, and tokens of the domains."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from btx.data import corpus
from btx.data.texts import Texts
from btx.errors import ArtifactError
from btx.graph.artifact import fingerprint
from btx.graph.digests import Digests
from btx.graph.step import Step
from btx.recipe.recipe import Recipe
from btx.recipe.settings import DataSettings, RoutingRule, TrainSettings
from btx.steps.adapted import MergedLora
from btx.steps.branch import VerifySeed
from btx.steps.given import ExternalCheckpoint
from btx.steps.model import ModelStep
from btx.steps.pretrain import Pretrain
from btx.steps.tokenizer import Tokenizer
from btx.steps.tokens import TokensStep
from btx.steps.vocabulary import VocabularyStep

S = TypeVar("S", bound=Step)
ANSWERS = "@answers"  # suffix of the seed's tokens where the loss covers answers only, unlike in pretraining


@dataclass(frozen=True)
class Start:
    """What every conversion of a recipe starts from."""

    seed: ModelStep
    tokenizer: Step  # whose folder has the seed's tokenizer
    branch: VerifySeed
    tokens: dict[str, TokensStep]  # of the domains that have data, by the seed's tokenizer
    documents: dict[str, tuple[list[str], list[str]]]  # files and held-out files of those, and of the seed's own data


@dataclass(frozen=True)
class Branch:
    """One expert that is to be made: its name, its domain's text, its tokens, and its part (n, N) of the sequences."""

    name: str
    text: TokensStep
    tokens: int
    part: tuple[int, int]


@dataclass(frozen=True)
class Model:
    """A model that a conversion makes: the step that publishes it, its routing rule, the domains in its tokenizer."""

    step: ModelStep
    rule: RoutingRule | None = None  # of a Mixture of Experts, when it is measured
    tokens: dict[str, TokensStep] = field(default_factory=dict)
    exported: bool = False
    before: str = ""  # the model it was finetuned from, which it should not be worse than


class Sources:
    """Makes the steps of the inputs, and registers every step by its label without the variant, parents first."""

    def __init__(self, recipe: Recipe, base: Path, *, root: Path, digests: Digests, variant: str = "") -> None:
        self.recipe, self.base, self.root, self.digests = recipe, base, root, digests
        self.variant = variant  # suffix of the step names, when several recipes run together
        self.texts = Texts(recipe, base, digests)
        self.steps: dict[str, Step] = {}
        self.said_at: dict[str, str] = {}  # where the recipe says how a domain's expert is made, by its steps' labels

    def add(self, step: S) -> S:
        """Register a step under its label; returns the step."""
        mark = self.variant
        self.steps[step.label.removesuffix(f" {mark}").removesuffix(f":{mark}") if mark else step.label] = step
        return step

    def place(self, name: str | None = None) -> dict[str, object]:
        """The execution fields that every step has."""
        named = " ".join(part for part in (name, self.variant) if part) or None
        return {"root": self.root, "where": self.recipe.run, "name": named}

    def start(self) -> Start:
        """The seed, its verification, and the tokens of the domains."""
        seed, tokenizer = self.seed()
        documents = {name: (d.data, d.valid) for name, d in self.recipe.domains.items() if d.data}
        tokens = {name: self.tokens(name, *files, tokenizer) for name, files in documents.items()}
        if self.recipe.seed.sources:
            documents["seed"] = self.recipe.seed.sources, self.recipe.seed.valid
        return Start(seed, tokenizer, self.add(VerifySeed(seed=seed, **self.place())), tokens, documents)

    def all_data(self, start: Start, tokenizer: Step | None = None, suffix: str = "") -> dict[str, TokensStep]:
        """Every domain's tokens and the seed's own, by the seed's tokenizer or another."""
        return {name: self.tokens(name, *files, tokenizer or start.tokenizer, suffix)
                for name, files in start.documents.items()}  # fmt: skip

    def seed(self) -> tuple[ModelStep, Step]:
        """The seed's step, and the step whose folder has its tokenizer."""
        seed = self.recipe.seed
        if not seed.is_builtin:
            given = self.given("seed", seed.checkpoint, "seed.checkpoint")
            return given, given
        plain = self.recipe.data.model_copy(update={"loss_mask": "all"})  # pretraining learns every token
        read = {"data": DataSettings(**plain.model_dump(exclude={"valid_bytes", "date"}))}  # for training a tokenizer
        reads = {**self.texts.reads("seed", seed.sources, seed.valid), **read}
        tokenizer = self.add(Tokenizer(vocab_size=seed.builtin.vocab_size, **reads, **self.place()))
        tokens = self.tokens("seed", seed.sources, seed.valid, tokenizer, data_settings=plain)
        own: dict[str, float] = {"learning_rate": seed.builtin.learning_rate, "batch_tokens": seed.builtin.batch_tokens}
        if seed.builtin.min_lr_ratio is not None:
            own["min_lr_ratio"] = seed.builtin.min_lr_ratio
        train = TrainSettings(**self.recipe.train.model_dump(include=set(TrainSettings.model_fields)) | own)
        return self.add(
            Pretrain(tokenizer=tokenizer, tokens=tokens, shape=seed.builtin, train=train, **self.place())
        ), tokenizer

    def given(self, name: str, checkpoint: str, key: str) -> ExternalCheckpoint:
        """A checkpoint folder that the recipe names at a key, its header and config checked, its content hashed."""
        from btx.checkpoints.reader import Checkpoint

        path, origin = self.local(checkpoint, key)
        try:
            found, hint = path.is_dir(), corpus.hint(path)
        except (OSError, RuntimeError) as error:  # unknown ~user, name too long, no permission
            raise ArtifactError(f"{key}: {checkpoint:.200} cannot be looked up: {error}. Correct the path.") from error
        if not found:
            raise ArtifactError(
                f"{key}: there is no folder {path}{hint}. A checkpoint is a local Hugging Face folder; "
                "relative paths start at the recipe."
            )
        checkpoint_ = Checkpoint(path)
        content = checkpoint_.digest(self.digests)
        return ExternalCheckpoint(content=content, path=path, origin=origin, **self.place(name))

    def local(self, checkpoint: str, key: str) -> tuple[Path, str | None]:
        """The folder of a checkpoint that a recipe names; if it is the hub's, fetched, and its name with the commit."""
        from btx.checkpoints import hub

        if hub.is_hub(checkpoint):
            return hub.checkpoint(checkpoint, key)
        try:
            return (self.base / Path(checkpoint).expanduser()).resolve(), None
        except (OSError, RuntimeError) as error:  # unknown ~user, a link to itself
            raise ArtifactError(f"{key}: {checkpoint:.200} cannot be looked up: {error}. Correct the path.") from error

    def expert(self, name: str, domain: str, checkpoint: str, seed: ModelStep) -> ModelStep:
        """An expert trained elsewhere: a model, or a LoRA adapter of the seed."""
        from btx.merge.adapter import WEIGHTS, is_adapter
        from btx.merge.lora_config import CONFIG

        path, _origin = self.local(checkpoint, f"domains.{domain}.checkpoint")
        try:
            found = is_adapter(path)
        except OSError:  # `given` says what is wrong
            found = False
        if not found:
            return self.given(name, checkpoint, f"domains.{domain}.checkpoint")
        files = [path / file for file in (CONFIG, WEIGHTS) if (path / file).is_file()]
        content = fingerprint([[file.name, self.digests(file)] for file in files])
        return self.add(MergedLora(seed=seed, content=content, path=path, **self.place(name)))

    def vocabulary(self, seed: Step, given: dict[str, ExternalCheckpoint]) -> VocabularyStep | None:
        """The step that joins the tokenizers, if an expert has added tokens; else None."""
        from btx.merge.vocabulary import is_extended

        if not isinstance(seed, ExternalCheckpoint):
            return None
        experts = {name: step for name, step in given.items() if is_extended(seed.path, step.path)}
        return self.add(VocabularyStep(seed=seed, experts=experts, **self.place())) if experts else None

    def tokens(
        self, name: str, data: list[str], valid: list[str], tokenizer: Step, suffix: str = "",
        template: Step | None = None, data_settings: DataSettings | None = None,
    ) -> TokensStep:  # fmt: skip
        """The step that tokenises some data with a tokenizer; the same step for the same label."""
        data_settings = data_settings or self.recipe.data
        if name == "seed" and self.recipe.seed.is_builtin and data_settings.loss_mask != "all":
            suffix += ANSWERS
        label = f"tokens:{name}{suffix}"
        if label in self.steps:
            found = self.steps[label]
            assert isinstance(found, TokensStep)
            return found
        reads = self.texts.reads("seed" if name == "seed" else f"domains.{name}", data, valid)
        reads["data"] = data_settings
        return self.add(TokensStep(tokenizer=tokenizer, template=template, **reads, **self.place(name + suffix)))
