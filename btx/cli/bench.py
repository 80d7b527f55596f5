"""`btx bench`: one verb per benchmark. Heavy imports wait until a verb needs them."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Benchmarks, as ratios to a peer in the same run."""


@bench.command("train")
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="A checkpoint folder; default: a small Llama with random weights.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=256), default=8192, show_default=True, help="Tokens per step.")
@click.option("--steps", type=click.IntRange(min=2), default=4, show_default=True, help="Optimiser steps per round.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds per loop, interleaved."
)
@click.option("--loop", "names", multiple=True, metavar="NAME", help="Only this loop; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write figures and loss curves as JSON.")
def bench_train(
    model: Path | None, tokens: int, steps: int, rounds: int, names: tuple[str, ...], out: Path | None
) -> None:
    """Compare training tokens/s and peak memory with bare loops and transformers' Trainer on the same model."""
    import json

    from rich.console import Console

    from btx.bench.training import CONTENDERS, bench_training, table
    from btx.errors import RecipeError, nearest

    for name in names:
        if name not in CONTENDERS:
            raise RecipeError(f"--loop: there is no loop {name!r}; {nearest(name, CONTENDERS)}")
    console = Console()
    with console.status("") as status:
        found = bench_training(model=model, tokens=tokens // 256 * 256, steps=steps, rounds=rounds,
                               names=list(names or CONTENDERS), say=status.update)  # fmt: skip
    console.print(table(found))
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@bench.command("loss")
@click.option("--tokens", type=click.IntRange(min=16), default=4096, show_default=True, help="Tokens per micro-batch.")
@click.option("--vocabulary", type=click.IntRange(min=2), default=128256, show_default=True, help="Rows of the head.")
@click.option("--width", type=click.IntRange(min=1), default=576, show_default=True, help="Hidden size of the model.")
@click.option("--dtype", default="float32", show_default=True, help="Dtype of the hidden states: float32 or bfloat16.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds, interleaved.")
@click.option("--way", "names", multiple=True, metavar="NAME", help="Only this implementation; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the figures as JSON.")
def bench_loss(
    tokens: int, vocabulary: int, width: int, dtype: str, rounds: int, names: tuple[str, ...], out: Path | None
) -> None:
    """Compare head and loss, forward and backward, with full logits: seconds, peak memory, error against float64."""
    import json

    from rich.console import Console

    from btx.bench.loss import at_hand, bench_loss, table
    from btx.errors import RecipeError, nearest

    for given, choice in ((names, at_hand()), ((dtype,), ("float32", "bfloat16"))):
        for name in given:
            if name not in choice:
                raise RecipeError(f"there is nothing named {name!r} to measure; {nearest(name, choice)}")
    console = Console()
    with console.status("") as status:
        found = bench_loss(tokens=tokens, vocabulary=vocabulary, width=width, dtype=dtype, rounds=rounds,
                           names=list(names or at_hand()), say=status.update)  # fmt: skip
    console.print(table(found))
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@bench.command("kernels")
@click.option("--shape", "shapes", multiple=True, metavar="NAME", help="Only this shape; repeatable.")
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Only this kernel; repeatable.")
@click.option("--dtype", "dtypes", multiple=True, metavar="NAME", help="Only float32, or only bfloat16.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Rounds per kernel, interleaved."
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the rows as JSON.")
def bench_kernels(
    shapes: tuple[str, ...], kernels: tuple[str, ...], dtypes: tuple[str, ...], rounds: int, out: Path | None
) -> None:
    """Time every expert kernel as a ratio to dense matrix products of the same active FLOPs."""
    from rich.console import Console

    from btx.bench.kernels import bench_kernels as measure
    from btx.bench.kernels import table

    console = Console()
    with console.status("") as status:
        rows = measure(shapes=list(shapes), kernels=list(kernels), dtypes=list(dtypes) or ["float32", "bfloat16"],
                       rounds=rounds, out=out, say=status.update)  # fmt: skip
    console.print(table(rows))


@bench.command("merge")
@click.option("--shape", default="0.65b", show_default=True, help="0.65b, 7b or 70b.")
@click.option("--models", type=click.IntRange(min=2), default=4, show_default=True, help="Models to merge.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds, interleaved.")
@click.option("--sparse", is_flag=True, help="Simulate with sparse files that take no disk; no cp, no mergekit.")
@click.option("--directory", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Scratch folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the figures as JSON.")
def bench_merge(shape: str, models: int, rounds: int, sparse: bool, directory: Path | None, out: Path | None) -> None:
    """Compare the merge with cp of its output and, if installed, mergekit: seconds and peak memory."""
    import json

    from rich.console import Console

    from btx.bench.merge import bench_merge as measure

    console = Console()
    with console.status("") as status:
        found = measure(shape=shape, models=models, rounds=rounds, sparse=sparse, directory=directory,
                        say=status.update)  # fmt: skip
    for name, value in found.items():
        text = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        console.print(f"{name:<18} {text}")
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
