"""`btx plan`: tokens, FLOPs, time, memory and disk of a recipe, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from btx.checkpoints.hub import described
from btx.checkpoints.validate import read_config, require_size, sees_images
from btx.conversions import experts
from btx.conversions.planned import Config, seed_config
from btx.conversions.registry import conversions
from btx.errors import RecipeError
from btx.merge.layout import layout
from btx.models import flops, memory
from btx.models.families import family_of, feed_forward_width, mixture_family, with_width
from btx.models.native import native_config
from btx.models.target import warnings_of
from btx.recipe.mixing import mix
from btx.recipe.recipe import Recipe
from btx.recipe.settings import FinetuneSettings, RunSettings, TrainSettings, steps_of
from btx.report.figures import human, human_count

GPU = 400.0  # TFLOP/s that training in bf16 sustains on a current GPU
MOMENTS = 8  # bytes a parameter of finetune.moments: experts, two means in fp32
EFFICIENCY = 0.5  # of training, as a share of a large matmul's speed: 0.45 to 0.6 was seen on CPUs


@dataclass(frozen=True)
class Row:
    """The planned cost of one step; `memory` and `disk` in bytes."""

    label: str
    parameters: int
    active: int
    tokens: int
    steps: int
    flops: int
    memory: int
    disk: int


def _experts(recipe: Recipe, base: Path) -> list[Path]:
    """The folders that describe the experts trained elsewhere."""
    domains = recipe.domains.items()
    return [described(c, base, f"domains.{name}.checkpoint") for name, domain in domains for c in domain.checkpoints]


def merged_shape(recipe: Recipe, base: Path, dense: Config) -> Config:
    """The seed's config as the merge pads it for given experts: the widest feed-forward, all added tokens."""
    from btx.merge.adapter import is_adapter
    from btx.merge.vocabulary import is_extended, join

    paths = _experts(recipe, base)
    experts = {str(path): path for path in paths if (path / "config.json").is_file() and not is_adapter(path)}
    seed = described(recipe.seed.checkpoint, base, "seed.checkpoint")
    made = dict(dense)
    if not mixture_family(dense):
        widths = [feed_forward_width(read_config(path), str(path)) for path in experts.values()]
        made = with_width(dense, max(feed_forward_width(dense, "the seed"), *widths, 0))
    if extended := {name: path for name, path in experts.items() if is_extended(seed, path)}:
        vocabulary, _ = join(seed, extended)
        made["vocab_size"] = max(dense["vocab_size"], vocabulary.common + len(vocabulary.tokens))
    return made


def merged_config(recipe: Recipe, dense: Config) -> Config:
    """The config of the Mixture of Experts that the recipe makes."""
    experts = layout(recipe.merge, recipe.models, dense, "the seed")
    config = experts.config(dense, recipe.finetune.experts_per_token, "the seed")
    return config.to_dict()  # type: ignore[no-any-return]


def _row(label: str, config: Config, tokens: int, settings: TrainSettings, *, dtype: str, where: RunSettings) -> Row:
    count = flops.parameters(config)
    steps = steps_of(tokens, settings)
    seen = steps * settings.batch_tokens
    state = memory.training_memory(config, settings, where)
    total = flops.training_flops(config, seen) + flops.attention_flops(config, seen, sequence=settings.sequence_length)
    return Row(label, count.total, count.active, seen, steps, total, state.total, flops.checkpoint_bytes(config, dtype))


def rows(recipe: Recipe, base: Path) -> list[Row]:
    """The planned cost of every training and of the merge; RecipeError for an impossible config."""
    try:
        return _rows(recipe, base, seed_config(recipe, base))
    except ValueError as error:
        raise RecipeError(f"the seed's config.json makes no model: {error}. Correct it.") from error


def _rows(recipe: Recipe, base: Path, dense: Config) -> list[Row]:
    require_size(dense, "the seed")
    family_of(dense, "the seed")
    dense = native_config(dense, "the seed").to_dict()
    dtype = str(dense.get("dtype") or dense.get("torch_dtype") or "float32")
    row = partial(_row, dtype=dtype, where=recipe.run)
    found: list[Row] = []
    if recipe.seed.is_builtin:
        shape = recipe.seed.builtin
        settings = recipe.train.model_copy(update={"batch_tokens": shape.batch_tokens})
        found.append(row("seed", dense, shape.tokens, settings))
    kept = recipe.finetune.moments == "experts"
    for one in experts.plan(recipe, None, dense):
        made = row(one.label, one.config, one.tokens, one.settings)
        found.append(replace(made, disk=made.disk + MOMENTS * made.parameters * kept))
    moe = merged_config(recipe, merged_shape(recipe, base, dense))
    count = flops.parameters(moe)
    found.append(Row("merge", count.total, count.active, 0, 0, 0, 0, flops.checkpoint_bytes(moe, dtype)))
    if not any(domain.data for domain in recipe.domains.values()):
        return found  # without data only the merge can run
    found.append(row("finetune", moe, recipe.finetune.tokens, recipe.finetuning))
    for name, said in recipe.sections.items():
        known = {one.label for one in found}  # some conversions use the experts of the merge
        planned = [t for t in conversions()[name].plan(recipe, said, dense) if t.label not in known]
        found += [row(t.label, t.config, t.tokens, t.settings) for t in planned]
    return found


def show_plan(recipe: Recipe, base: Path, *, tflops: float, devices: int) -> None:
    """Print the plan as a table, then warnings and notes."""
    from rich.console import Console
    from rich.table import Table

    found = rows(recipe, base)
    table = Table(title=f"{recipe.name}: what it takes", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("step", "params", "active", "tokens", "steps", "FLOPs", "time", "memory", "disk"):
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
    for row in [*found, _total(found)]:
        hours = row.flops / (tflops * 1e12) / 3600
        table.add_row(
            row.label, _or_blank(row.parameters), _or_blank(row.active), _or_blank(row.tokens), f"{row.steps:,}",
            f"{row.flops:.3g}", duration(hours), human(row.memory, "B"), human(row.disk, "B"),
        )  # fmt: skip
    Console(soft_wrap=True).print(table)
    console = Console()
    for line in [*warnings(recipe, base), *notes(recipe, found, tflops, devices)]:
        console.print(line, soft_wrap=True, highlight=False)


def compared(recipe: Recipe, base: Path, tflops: float) -> str:
    """What the recipe's comparison costs at least and at most, at so many sustained TFLOP/s.

    The recipe is as it was read: its arms may change what decides a setting that is `auto`.
    """
    from btx.compare.price import bounds
    from btx.compare.rounds import Rounds

    least, most = bounds(Rounds(recipe, base))
    times = [duration(price.flops / (tflops * 1e12) / 3600) for price in (least, most)]
    return (
        f"btx compare: {least.trainings} to {most.trainings} trainings, {least.flops:.3g} to {most.flops:.3g} FLOPs, "
        f"{times[0]} to {times[1]} of one device at {tflops:.3g} TFLOP/s, without starts and measurements."
    )


def warnings(recipe: Recipe, base: Path) -> list[str]:
    """Warnings about the recipe's checkpoints, as far as they exist."""
    from btx.merge.adapter import is_adapter

    seed = described(recipe.seed.checkpoint, base, "seed.checkpoint")
    folders = [seed, *_experts(recipe, base)]
    models = [folder for folder in folders if (folder / "config.json").is_file() and not is_adapter(folder)]
    configs = {folder: read_config(folder) for folder in models}
    return [
        f"Warning: {text}"
        for folder, config in configs.items()
        for text in warnings_of(config, str(folder), sees_images=sees_images(folder))
    ]


def sustained(recipe: Recipe, base: Path, said: float | None, *, here: bool) -> float:
    """TFLOP/s of one device: measured if `here`, or on a CPU if nothing is `said`; else `said` or a GPU's."""
    from btx.models.model import device_of

    at_hand = recipe.seed.is_builtin or described(recipe.seed.checkpoint, base, "seed.checkpoint").is_dir()
    if here or (said is None and at_hand and device_of(recipe.run).type == "cpu"):
        return measured_tflops(recipe, seed_config(recipe, base))
    return said or GPU


def measured_tflops(recipe: Recipe, config: Config) -> float:
    """TFLOP/s that training should sustain here: EFFICIENCY times a matmul's in the training precision.

    The matmul has the seed's widths and 2,048 tokens, and is timed for half a second.
    """
    import time

    import torch

    from btx.models import model

    model.set_threads(recipe.run)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    device = model.device_of(recipe.run)
    rows, width = 2048, int(config["hidden_size"])
    inner = int(config.get("intermediate_size") or 4 * width)  # some mixtures state the width of an expert alone
    left = torch.randn(rows, width, dtype=dtype, device=device)
    right = torch.randn(inner, width, dtype=dtype, device=device)
    count, started = -3, time.monotonic()  # the first three warm up
    while count < 3 or time.monotonic() - started < 0.5:
        torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
        if count == 0:
            started = time.monotonic()
    return EFFICIENCY * 2 * rows * width * inner * count / (time.monotonic() - started) / 1e12


def duration(hours: float) -> str:
    """Hours, or minutes and seconds below one hour."""
    if hours < 1:
        return f"{int(hours * 60)}:{round(hours * 3600) % 60:02d} min"
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.2f} h"


def _or_blank(number: int) -> str:
    return human_count(number) if number else ""


def notes(recipe: Recipe, found: list[Row], tflops: float, devices: int) -> list[str]:
    """Sentences below the table: wall time, formulas, precision, routing and data mix."""
    trained = [r for r in found if r.flops]
    apart = [r for r in trained if r.label.startswith("train:")]
    after = sum(r.flops for r in trained if not r.label.startswith("train:"))
    hours = (max((r.flops for r in apart), default=0) + after) / (tflops * 1e12 * devices) / 3600
    whole = sum(r.flops for r in trained) / (tflops * 1e12 * devices) / 3600
    weights = mix(recipe, [n for n, d in recipe.domains.items() if d.data] + (["seed"] if recipe.seed.sources else []))
    shares = ", ".join(f"{n} {w / sum(weights.values()):.1%}" for n, w in weights.items())
    settings: FinetuneSettings = recipe.finetuning
    if not trained:
        return ["Nothing is trained: no domain has `data`. Run with --until merge to make the merge alone."]
    return [
        f"Wall time of training with {devices} device(s) per job: {duration(hours)} with all experts in parallel, "
        f"{duration(whole)} one after another, at {tflops:.3g} sustained TFLOP/s per device (--tflops, or --here to "
        "measure).",
        "FLOPs: 6 · active parameters · tokens, and attention (causal). Memory: weights, gradients and AdamW state in "
        f"fp32, {'bf16 copies, ' * (settings.precision == 'bf16')}and an estimate of the activations, on one device "
        f"without sharding. Precision: {settings.precision} (train.precision; auto follows run.device).",
        f"Finetuning: {settings.routing}, balance {settings.balance.type} · {settings.balance.weight:g}"
        f"{f', z-loss · {settings.balance.z:g}' if settings.balance.z else ''}; "
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
