"""`btx plan`: tokens, FLOPs, time, memory and disk of a recipe, before anything runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx import flops
from btx.errors import RecipeError
from btx.families import family_of, moe_config
from btx.pipeline import mix
from btx.recipe import Recipe
from btx.settings import FinetuneSettings, TrainSettings
from btx.steps.merge import expert_names

Config = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One step's price."""

    label: str
    parameters: int
    active: int
    tokens: int
    steps: int
    flops: int
    memory: int
    disk: int


def seed_config(recipe: Recipe, base: Path) -> Config:
    """The seed's config: made, read from its folder, or as the recipe states it under seed.architecture."""
    shape = recipe.seed.builtin
    if recipe.seed.is_builtin:
        return {
            "model_type": "llama", "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads,
            "tie_word_embeddings": True, "dtype": "float32",
        }  # fmt: skip
    folder = base / Path(recipe.seed.checkpoint).expanduser()
    if (folder / "config.json").is_file():
        config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config
    if recipe.seed.architecture:
        return recipe.seed.architecture
    raise RecipeError(
        f"seed.checkpoint: there is no folder {folder}. Put the checkpoint there, or state its config.json "
        "under seed.architecture to plan without it."
    )


def widest(recipe: Recipe, dense: Config, base: Path) -> int:
    """The feed-forward width that all experts get: the widest one's, where given experts are at hand, or the seed's."""
    from btx.checks import width_of

    given = [base / Path(d.checkpoint).expanduser() for d in recipe.domains.values() if d.checkpoint]
    widths = [width_of(path) for path in given if (path / "config.json").is_file()]  # which adapters lack
    return max([int(dense["intermediate_size"]), *widths])


def merged_config(recipe: Recipe, dense: Config, width: int) -> Config:
    """The config of the Mixture of Experts that the recipe makes of models with a feed-forward width."""
    models = [*recipe.domains, *(["seed"] if recipe.merge.include_seed else [])]
    experts = len(expert_names(models, recipe.merge))
    chunks = recipe.merge.chunks if recipe.merge.experts == "split" else 1
    top_k = recipe.finetune.experts_per_token or experts
    config = moe_config(dense, experts=experts, top_k=top_k, width=width // chunks, where="the seed")
    return config.to_dict()  # type: ignore[no-any-return]


def _row(label: str, config: Config, tokens: int, settings: TrainSettings, dtype: str) -> Row:
    from btx.loop import steps_of

    count = flops.parameters(config)
    steps = steps_of(tokens, settings)
    seen = steps * settings.batch_tokens
    precision: flops.Precision = "fp32" if settings.precision == "fp32" else "bf16"
    rows = max(1, 16_384 // settings.sequence_length)
    memory = flops.memory(
        config,
        batch=rows,
        sequence=settings.sequence_length,
        precision=precision,
        checkpointing=settings.gradient_checkpointing,
    )
    total = flops.training_flops(config, seen) + flops.attention_flops(config, seen, sequence=settings.sequence_length)
    return Row(
        label, count.total, count.active, seen, steps, total, memory.total, flops.checkpoint_bytes(config, dtype)
    )


def rows(recipe: Recipe, base: Path) -> list[Row]:
    """The price of every training and of the merge."""
    dense = seed_config(recipe, base)
    family_of(dense, "the seed")
    dtype = str(dense.get("dtype") or dense.get("torch_dtype") or "float32")
    found: list[Row] = []
    if recipe.seed.is_builtin:
        shape = recipe.seed.builtin
        settings = recipe.train.model_copy(update={"batch_tokens": shape.batch_tokens})
        found.append(_row("seed", dense, shape.tokens, settings, dtype))
    for name, domain in recipe.domains.items():
        if domain.tokens and not domain.checkpoint:
            found.append(_row(f"train:{name}", dense, domain.tokens, recipe.train, dtype))
    moe = merged_config(recipe, dense, widest(recipe, dense, base))
    count = flops.parameters(moe)
    found.append(Row("merge", count.total, count.active, 0, 0, 0, 0, flops.checkpoint_bytes(moe, dtype)))
    settings = recipe.finetuning
    found.append(_row("finetune", moe, settings.tokens, settings, dtype))
    return found


def show_plan(recipe: Recipe, base: Path, *, tflops: float, devices: int) -> None:
    """Print the plan."""
    from rich.console import Console
    from rich.table import Table

    found = rows(recipe, base)
    table = Table(title=f"{recipe.name}: what it takes", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("step", "params", "active", "tokens", "steps", "FLOPs", "hours", "memory", "disk"):
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
    for row in [*found, _total(found)]:
        hours = row.flops / (tflops * 1e12) / 3600
        table.add_row(
            row.label, _or_blank(row.parameters), _or_blank(row.active), _or_blank(row.tokens), f"{row.steps:,}",
            f"{row.flops:.3g}", _hours(hours), flops.human(row.memory, "B"), flops.human(row.disk, "B"),
        )  # fmt: skip
    Console(soft_wrap=True).print(table)
    console = Console()
    for line in notes(recipe, found, tflops, devices):
        console.print(line, soft_wrap=True, highlight=False)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}"


def _or_blank(number: int) -> str:
    return flops.human_count(number) if number else ""


def notes(recipe: Recipe, found: list[Row], tflops: float, devices: int) -> list[str]:
    """What the table leaves open, in sentences."""
    trained = [r for r in found if r.flops]
    apart = [r for r in trained if r.label.startswith("train:")]
    after = sum(r.flops for r in trained if not r.label.startswith("train:"))
    hours = (max((r.flops for r in apart), default=0) + after) / (tflops * 1e12 * devices) / 3600
    weights = mix(recipe, [n for n, d in recipe.domains.items() if d.data] + (["seed"] if recipe.seed.sources else []))
    shares = ", ".join(f"{n} {w / sum(weights.values()):.1%}" for n, w in weights.items())
    settings: FinetuneSettings = recipe.finetuning
    return [
        f"Wall time with {devices} device(s) a training and all experts at once: {hours:,.2f} hours, at {tflops:g} "
        "TFLOP/s sustained a device (--tflops).",
        "FLOPs: 6 · active parameters · tokens, and attention (causal). Memory: weights, gradients and AdamW state "
        "in fp32, bf16 copies, and an estimate of the activations, on one device without sharding.",
        f"Finetuning: {settings.routing}, balance {settings.balance.form} · {settings.balance.weight:g}; "
        f"data: {shares}.",
    ]


def _total(found: list[Row]) -> Row:
    return Row(
        "total",
        0,
        0,
        sum(r.tokens for r in found),
        sum(r.steps for r in found),
        sum(r.flops for r in found),
        max(r.memory for r in found),
        sum(r.disk for r in found),
    )
