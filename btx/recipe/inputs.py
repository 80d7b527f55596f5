"""What a recipe starts from: the seed, and the domains."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from btx.recipe.fields import Count, Several, Text
from btx.recipe.settings import BuiltinSeed, Settings

BUILTIN_DATA = ["builtin:math", "builtin:code", "builtin:prose"]


class SeedRecipe(Settings):
    """The checkpoint that everything starts from."""

    checkpoint: Text = Field(
        description="a local Hugging Face folder, hf://org/name@revision of the hub, or `builtin`: a small Llama that "
        "btx pretrains"
    )
    data: list[Text] = Field(default_factory=list, description="text like the seed's training data, for the finetuning")
    valid: list[Text] = Field(default_factory=list)
    tokens: Count | None = Field(None, description="its weight in the finetuning mix; default: the domains' mean")
    builtin: BuiltinSeed = BuiltinSeed()
    architecture: dict[str, Any] | None = Field(
        None, description="the seed's config.json, for `btx plan` where the checkpoint is not at hand"
    )

    @property
    def is_builtin(self) -> bool:
        """Whether btx makes the seed itself."""
        return self.checkpoint == "builtin"

    @property
    def sources(self) -> list[str]:
        """Its data; by default the builtin texts for a builtin seed, none for others."""
        return self.data or (list(BUILTIN_DATA) if self.is_builtin else [])

    @model_validator(mode="after")
    def _used(self) -> SeedRecipe:
        idle = "tokens" if self.tokens is not None else "valid" if self.valid else None
        if idle and not self.sources:
            raise ValueError(f"`{idle}` applies to the seed's `data`, and there is none")
        return self


class DomainRecipe(Settings):
    """One domain: text to train an expert on, or an expert that exists."""

    data: list[Text] = Field(default_factory=list)
    valid: list[Text] = Field(default_factory=list, description="held-out files; default: a share of the documents")
    tokens: Count | None = Field(None, description="training tokens of the expert, of each if there are several")
    experts: Several = Field(1, description="how many to train; the sequences of the data are dealt to them in turn")
    expert: Text | dict[str, dict[str, Any]] = Field(
        "train",
        description="how it is made: train (continued pretraining), or a conversion that makes experts, such as "
        "anchored or adapter; with settings that differ from train's as a mapping, {train: {trainable: ffn}}",
    )
    checkpoint: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None,
        description="an expert trained elsewhere: a model, or a LoRA adapter, in a folder or of the hub "
        "(hf://org/name); a list of them for several",
    )

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints of experts trained elsewhere."""
        return [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint or []

    def names(self, domain: str) -> list[str]:
        """The names of its experts: the domain's, numbered if there are several."""
        count = len(self.checkpoints) or self.experts
        return [domain] if count == 1 else [f"{domain}.{n}" for n in range(count)]

    @model_validator(mode="after")
    def _enough(self) -> DomainRecipe:
        if self.checkpoint is None and not self.data:
            raise ValueError("a domain needs `data` to train on, or the `checkpoint` of an expert")
        if self.checkpoint is None and self.tokens is None:
            raise ValueError("say how many `tokens` this expert is trained on, such as 400k")
        if self.valid and not self.data:
            raise ValueError("`valid` holds documents out of `data`, and there is none")
        if self.checkpoint is not None and "experts" in self.model_fields_set:
            raise ValueError("`experts` counts those that are trained here; name several under `checkpoint` as a list")
        if self.checkpoint is not None and "expert" in self.model_fields_set:
            raise ValueError("`expert` says how one is made here, and `checkpoint` names one that exists; choose one")
        if isinstance(self.expert, dict) and len(self.expert) != 1:
            raise ValueError("`expert` names one way to make it, such as {adapter: {method: dora}}")
        return self
