"""The settings of reinforcement learning with verifiable rewards."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from btx.probes.formats import OF_ARITHMETIC, check_formats
from btx.recipe.fields import Count, Part, Positive, Share, Text, Weight, Whole, execution
from btx.recipe.settings import Settings, TrainSettings
from btx.recipe.task_settings import TaskSettings
from btx.rl.passrate import Band
from btx.rl.rewards import Reward, Scale

STATED = r"(?i)confidence\s*[:=]?\s*(\d{1,3}(?:\.\d+)?\s*%|[01]?\.\d+|[01])"
LEARNED = ("learning_rate", "min_lr_ratio", "warmup_steps", "weight_decay", "betas", "epsilon", "max_grad_norm",
           "precision", "gradient_checkpointing", "dtype", "seed")  # fmt: skip


class PolicySettings(Settings):
    """One run of GRPO: what is asked, how answers are rewarded, and how the policy is moved."""

    task: TaskSettings = Field(description="items with answers, as under tasks; file `builtin:arithmetic` is generated")
    reward: Reward = Field("binary", description="calibrated: less the Brier loss of the stated confidence (RLCR)")
    confidence: Text = Field(
        STATED, description="calibrated: a regular expression whose first group is the stated confidence"
    )
    unstated: Share = Field(
        0.5,
        description="calibrated: the Brier loss of an answer that states no confidence; 0.25 is that of one half, 1 of "
        "a confident mistake",
    )
    steps: Count = 100
    prompts: Count = Field(8, description="items asked in one step")
    generations: Annotated[Count, Field(ge=2)] = Field(8, description="answers to each, which are compared")
    temperature: Positive = 1.0
    sequence_length: Count = Field(512, description="tokens of a prompt and its completion, at most")
    kl: Weight = Field(0.0, description="weight of the KL divergence from the seed")
    scale_rewards: Scale = Field("none", description="group: advantages over each group's standard deviation")
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = Field(
        "dapo", description="how tokens are averaged, as trl has it"
    )
    learning_rate: Positive = 1e-6
    min_lr_ratio: Share = 0.1
    warmup_steps: Whole | Literal["auto"] = "auto"
    weight_decay: Weight = 0.0
    betas: tuple[Part, Part] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 needs a GPU")
    gradient_checkpointing: bool = False
    dtype: Literal["seed", "fp32", "bf16", "fp16"] = Field("seed", description="of the checkpoint that is written")
    seed: Whole = Field(0, description="of the order of items and of every sample")
    held_out: Count = Field(32, description="items that are asked along the run and not trained on; a fifth at most")
    probe_every: Count | None = Field(None, description="steps between those; default: at the start and the end")
    probe_samples: Count = Field(4, description="answers to each")
    formats: dict[Text, Text] = Field(
        default_factory=lambda: dict(OF_ARITHMETIC), min_length=1, description="as in probes.formats"
    )
    passrate: Text | None = execution(None, description="marks of the items by `btx passrate`")
    bands: list[Band] = Field(default_factory=list, description="which marks are trained on: [hard, medium]")
    other_marks: bool = Field(False, description="take marks that another model was given, or in another way")
    mark_every: Count | None = Field(None, description="steps after which items are marked again, by the policy")
    mark_samples: Count = Field(16, description="answers to each item that is marked again")

    @field_validator("formats")
    @classmethod
    def _expressions(cls, formats: dict[str, str]) -> dict[str, str]:
        return check_formats(formats)

    @model_validator(mode="after")
    def _coherent(self) -> PolicySettings:
        try:
            groups = re.compile(self.confidence).groups
        except re.error as error:
            raise ValueError(f"`confidence` is no regular expression of Python: {error}") from error
        if not groups:
            raise ValueError("`confidence` needs a group, whose text is the number: (...)")
        if self.reward == "calibrated" and self.scale_rewards != "none":
            raise ValueError(
                "reward: calibrated needs scale_rewards: none; divided by each group's deviation, the best confidence "
                "is no longer the chance of being right"
            )
        if self.task.max_new_tokens >= self.sequence_length:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) must hold a prompt and task.max_new_tokens "
                f"({self.task.max_new_tokens})"
            )
        if self.bands and not (self.passrate or self.mark_every):
            raise ValueError("`bands` needs marks: name the file of `btx passrate` under `passrate`")
        if (self.passrate or self.mark_every) and not self.bands:
            raise ValueError("marks are used if `bands` says which are trained on; set it, such as [hard, medium]")
        return self

    @property
    def group(self) -> int:
        """Completions of a step."""
        return self.prompts * self.generations

    @property
    def training(self) -> TrainSettings:
        """The same as settings of a training, whose step takes this many tokens at most."""
        said = {name: getattr(self, name) for name in LEARNED}
        return TrainSettings(**said, sequence_length=self.sequence_length,
                             batch_tokens=self.sequence_length * self.group)  # fmt: skip
