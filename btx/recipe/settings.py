"""The settings of every step, as strict models: what a recipe may say, with its defaults and its bounds.

Every setting belongs to one of three classes. Most are *identity*: they decide the result and are part of a step's key.
Those marked `environment` (device, threads, passes) may change it within rounding: they are recorded, like versions and
processors. Those marked `execution` (paths, workers) do neither. No torch here: a recipe is read in milliseconds.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from btx.recipe.fields import Bytes, Count, Part, Positive, Share, Text, Weight, Whole, environment, execution, later

if TYPE_CHECKING:
    import torch


class Settings(BaseModel):
    """Frozen; unknown keys are refused, and so are numbers for text, and true and false for numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON values for the fingerprint."""
        dumped = self.model_dump(mode="json")
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            if extra.get("execution") or (extra.get("later") and getattr(self, name) == info.default):
                del dumped[name]
            elif isinstance(value := getattr(self, name), Settings):
                dumped[name] = value.identity()
        return dumped


class BuiltinSeed(Settings):
    """The seed that btx makes itself when `seed.checkpoint` is `builtin`: a small Llama and its tokenizer."""

    vocab_size: Annotated[Count, Field(gt=256)] = 2048  # at least all bytes and the end-of-text token
    hidden_size: Count = 256
    intermediate_size: Count = 768
    layers: Count = 4
    heads: Count = 4
    tokens: Count = Field(2_000_000, description="pretraining tokens")
    learning_rate: Positive = 3e-3
    min_lr_ratio: Share | None = later(
        None, description="end of its cosine, as a share of the peak; default: train.min_lr_ratio; 1: it does not decay"
    )
    batch_tokens: Count = 8192

    @model_validator(mode="after")
    def _whole_heads(self) -> BuiltinSeed:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of twice heads ({self.heads})")
        return self

    @property
    def config(self) -> dict[str, Any]:
        """The part of its config.json that is known before it is trained."""
        return {
            "model_type": "llama", "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "tie_word_embeddings": True, "dtype": "float32",
        }  # fmt: skip


class DataSettings(Settings):
    """How documents are read and which of them are held out."""

    directory: str | None = execution(None, description="what data paths are relative to; default: the recipe's folder")
    holdout: Part = Field(
        0.05,
        description="share of a domain's documents held out for reports (test), by hash; at least 30, if these are no "
        "more than a fifth; 0: only `valid` files are held out",
    )
    select: Part = Field(
        0.05, description="share also held out, likewise, for choosing settings; of `valid` files it is half"
    )
    valid_bytes: Annotated[Count, Field(ge=4)] = Field(
        4096, description="a held-out document is cut to this many bytes of text"
    )
    loss_mask: Literal["all", "completion"] = Field(
        "all", description="all: plain next-token loss, as in the paper; completion: only answers count"
    )
    ignore: list[Text] = Field(
        default_factory=list, description="columns, and keys of messages, that are left out: [source_url, name]"
    )
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = Field(
        None, description="the date given to a chat template that asks for today's, such as 2026-01-31"
    )
    on_bad_line: Literal["error", "skip"] = Field("error", description="skip: leave bad lines out and count them")

    @field_validator("date")
    @classmethod
    def _day(cls, date: str | None) -> str | None:
        if date is not None:
            datetime.date.fromisoformat(date)
        return date

    @model_validator(mode="after")
    def _something_left(self) -> DataSettings:
        if self.holdout + self.select >= 1:
            raise ValueError(
                f"holdout ({self.holdout:g}) and select ({self.select:g}) leave nothing to train on; choose less"
            )
        return self


class TrainSettings(Settings):
    """One training: the optimiser and its schedule. The defaults are the paper's where it states one."""

    sequence_length: Count = 1024
    batch_tokens: Count = Field(65_536, description="tokens in one optimiser step, over all devices")
    learning_rate: Positive = 1e-4
    min_lr_ratio: Share = Field(0.1, description="end of the cosine schedule, as a share of the peak (paper: 0.1)")
    warmup_steps: Whole | Literal["auto"] = Field(
        "auto", description="auto: the paper's 100, or a tenth of the steps where that is less"
    )
    weight_decay: Weight = 0.1
    betas: tuple[Part, Part] = (0.9, 0.95)
    epsilon: Positive = 1e-8
    max_grad_norm: Positive = Field(1.0, description="gradient clipping: larger gradients are scaled to this norm")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="auto: bf16 on a GPU that has it and on a CPU where it is faster, else fp32; weights, "
        "optimiser and sums are float32 in both",
    )
    gradient_checkpointing: bool = False
    dtype: Literal["seed", "fp32", "bf16", "fp16"] = Field("seed", description="of the checkpoint that is written")
    seed: Whole = Field(0, description="of the data order and of every random draw")
    max_bad_steps: Count = Field(10, description="consecutive non-finite steps that end the job (exit code 4)")

    @model_validator(mode="after")
    def _whole_batch(self) -> TrainSettings:
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence_length ({self.sequence_length})"
            )
        return self


class ExpertSettings(TrainSettings):
    """Training of the experts; other trainings take what they do not set themselves from here, `trainable` aside."""

    trainable: Literal["all", "ffn"] = Field(
        "all",
        description="ffn: the feed-forward blocks alone, so that all else is the seed's and averaging loses nothing",
    )


def steps_of(tokens: int, settings: TrainSettings) -> int:
    """Optimiser steps for a budget of tokens, at least one."""
    return max(1, round(tokens / settings.batch_tokens))


def torch_dtype(name: str, seed: torch.dtype) -> torch.dtype:
    """A torch dtype from its name in a recipe; `seed` means the seed's own."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(name, seed)


class BalanceSettings(Settings):
    """The load-balancing loss. A weight means nothing without its convention, so both are stated."""

    type: Literal["btx", "switch", "transformers", "bias", "none"] = Field(
        "btx",
        description="btx: the paper's, summed over layers; switch: hard counts, mean over layers; "
        "transformers: load_balancing_loss_func, layers pooled; bias: no loss, but a bias on each expert's probability "
        "in the choice alone, moved by `weight` after each step against its load (DeepSeek-V3, theirs is 0.001)",
    )
    weight: Weight = 0.01
    z: Weight = later(
        0.0, description="weight of the router z-loss, summed over layers, besides; ST-MoE's is 0.001; 0: none"
    )


class FinetuneSettings(TrainSettings):
    """Training of the merged model, router included."""

    tokens: Count = 1_000_000
    routing: Literal["top_k", "switch", "soft", "sample_top1"] = "top_k"
    top_k: Count = Field(2, description="experts per token under top_k")
    soft_first_layer: bool = Field(
        False,
        description="sample_top1: the first layer routes to all experts, as in the paper; no stock class can hold it, "
        "so there is no export then",
    )
    balance: BalanceSettings = BalanceSettings()
    trainable: Literal["all", "router", "no_experts"] = "all"
    mix: dict[str, Weight] = Field(
        default_factory=dict,
        description="share of each domain (and of `seed`, its own data); default: by its tokens",
    )
    dead_below: Share = Field(0.1, description="an expert with less than this share of a uniform load counts as dead")

    @property
    def experts_per_token(self) -> int | None:
        """The experts per token that the exported config states; None stands for all experts."""
        return {"top_k": self.top_k, "soft": None}.get(self.routing, 1)

    @property
    def rule(self) -> RoutingRule:
        """The routing rule of these settings, for measurements."""
        return RoutingRule(routing=self.routing, experts_per_token=self.experts_per_token,
                           soft_first_layer=self.soft_first_layer)  # fmt: skip

    @model_validator(mode="after")
    def _whole_batch(self) -> FinetuneSettings:
        return self  # unset fields come from `train`, so the recipe checks the two together

    @model_validator(mode="after")
    def _soft_first(self) -> FinetuneSettings:
        if self.soft_first_layer and self.routing != "sample_top1":
            raise ValueError(f"soft_first_layer belongs to routing sample_top1, not to {self.routing}")
        if self.balance.type == "bias" and self.routing not in ("top_k", "switch"):
            raise ValueError(f"balance.type bias moves the choice of routing top_k and switch; {self.routing} has none")
        return self


class RoutingRule(Settings):
    """How tokens are routed when a Mixture of Experts is measured; `experts_per_token` None stands for all."""

    routing: Literal["top_k", "switch", "soft", "sample_top1"]
    experts_per_token: int | None
    soft_first_layer: bool


class MeasureSettings(Settings):
    """The settings of `evaluate` that decide a model's scores."""

    split: Literal["test", "select"] = Field(
        "test", description="held-out documents to score: test for reports, select for choosing settings"
    )
    tokens: Count = Field(200_000, description="held-out tokens scored per domain, at most")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="for all models of a report; auto: bf16 on a GPU that has it and on a CPU where it is faster, else "
        "fp32",
    )
    batch_tokens: Count = environment(8192)


class EvaluateSettings(MeasureSettings):
    """Bits per byte on held-out documents."""

    sequence_length: Count | None = Field(None, description="window; default: train.sequence_length")
    bootstrap: Count = Field(1000, description="resamples of the source documents for the 95 % intervals")
    seed: Whole = 0

    @property
    def measure(self) -> MeasureSettings:
        """The settings that decide a model's scores."""
        return MeasureSettings(**{name: getattr(self, name) for name in MeasureSettings.model_fields})


class ExportSettings(Settings):
    """The published folder."""

    shard_bytes: Count = Field(5 * 10**9, description="largest weight file")
    layout: Literal["published", "fused"] = Field(
        "published", description="expert tensors: one by one as published, or fused as transformers 5 holds them"
    )
    name: Text | None = Field(None, description="title of the model card; default: the recipe's name")
    base_model: Text | None = Field(None, description="what the card calls the seed; default: its folder's name")
    license: Text | None = Field(None, description="for the card's front matter; default: none is claimed")


class RunSettings(Settings):
    """Where and how a recipe runs; nothing here changes a result by more than rounding."""

    directory: Text = execution("runs", description="relative to the working directory")
    engine: Literal["local"] = execution("local")
    workers: Count | Literal["auto"] = execution("auto", description="training jobs at once; auto: one per device")
    device: Literal["auto", "cpu", "cuda"] = environment("auto")
    kernel: Text = environment("auto", description="expert kernel; see `btx doctor` for the available ones")
    micro_batch: Count | Literal["auto"] = environment(
        "auto", description="sequences per device and backward pass; any number gives the same result but for rounding"
    )
    threads: Count | Literal["auto"] = environment("auto", description="CPU threads of a job")
    max_memory: Bytes = execution(2**30, description="of a merge, above the interpreter's own: 1GiB, 4GB, ...")
    checkpoint_minutes: Positive = execution(10.0, description="time between saved training states")
    checkpoint_steps: Count | None = execution(None, description="save after this many steps instead")
    hang_minutes: Positive = execution(
        60.0, description="a training that reports nothing for so long is killed and restarted, once"
    )
    launch: Text | None = environment(None, description="an `accelerate config` file: jobs run under accelerate launch")
    report_to: list[Text] = execution([], description="trackers of accelerate: tensorboard, wandb, ...")
