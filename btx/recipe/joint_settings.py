"""Settings of what is trained after a merge, and of adapters of the library peft."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from btx.recipe.fields import Text
from btx.recipe.settings import FinetuneSettings, Settings


class AdapterRule(Settings):
    """A method of peft, and options of its config."""

    method: Text = Field("lora", description="lora, dora, or another method of peft that changes modules")
    options: dict[str, Any] = Field(
        default_factory=dict, description="of peft's config for the method: r, lora_alpha, target_modules, ..."
    )


class JointSettings(FinetuneSettings):
    """The finetuning of merged experts."""

    moments: Literal["fresh", "experts"] = Field(
        "fresh", description="the optimiser's at the start; experts: their own, averaged over those that share a tensor"
    )
    adapter: AdapterRule | None = Field(
        None, description="train an adapter and the routers, and merge it at the end; {} is LoRA of all linear layers "
        "and of the experts"
    )  # fmt: skip

    @property
    def plain(self) -> FinetuneSettings:
        """What decides the training of any Mixture of Experts."""
        return FinetuneSettings(**{name: getattr(self, name) for name in FinetuneSettings.model_fields})

    @model_validator(mode="after")
    def _adapted(self) -> JointSettings:
        if self.adapter and self.trainable != "all":
            raise ValueError(
                f"adapter trains an adapter and the routers, so trainable: {self.trainable} does not apply"
            )
        if self.adapter and self.moments != "fresh":
            raise ValueError("an adapter has no moments to start from; leave moments or adapter out")
        return self
