"""`btx passrate`: how hard each item of a task is for a model."""

from __future__ import annotations

from pathlib import Path

import click

from btx.errors import RecipeError


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("items")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE",
              help="Write a mark per item: .jsonl or .parquet.")  # fmt: skip
@click.option("--set", "said", multiple=True, metavar="NAME=VALUE",
              help="A setting of the task, as under `tasks` in a recipe: prompt='{question}', few_shot=5.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Answers to each item.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the samples.")
@click.option("--confidence", default=None, metavar="REGEX", help="A stated confidence, which is no part of an answer.")
@click.option("--date", default=None, metavar="YYYY-MM-DD", help="For a chat template that asks for today's.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def passrate(
    model: Path, items: str, output: Path, said: tuple[str, ...], samples: int, temperature: float, seed: int,
    confidence: str | None, date: str | None, device: str,
) -> None:  # fmt: skip
    """Mark ITEMS, a file or `builtin:arithmetic`, by how often sampled answers of MODEL are right.

    Each mark has the passes, Wilson's interval and a band: impossible, hard, medium, easy, or broken. `grpo.bands` says
    which of them are trained on.
    """
    from collections import Counter

    from btx.recipe.settings import RunSettings
    from btx.recipe.strict_yaml import parse_yaml
    from btx.rl.marking import marked
    from btx.rl.passrate import BANDS, SUFFIXES, write_marks
    from btx.rl.settings import STATED
    from btx.tasks.items import ARITHMETIC

    if output.suffix not in SUFFIXES:
        raise RecipeError(f"--output {output} must end with {' or '.join(SUFFIXES)}.")
    if items != ARITHMETIC and not Path(items).is_file():
        raise RecipeError(f"there is no file {items}. Name one with items, or {ARITHMETIC}.")
    task = {"file": items, "kind": "exact_match"}
    for one in said:
        name, equals, value = one.partition("=")
        if not equals:
            raise RecipeError(f"--set {one!r} is not of the form name=value.")
        task[name.strip()] = parse_yaml(value, f"--set {one}")
    where = RunSettings.model_validate({"device": device})

    def told(done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            click.echo(f"{done} of {total} items", err=True)

    found = marked(model, task, samples=samples, temperature=temperature, seed=seed, where=where,
                   pattern=confidence or STATED, date=date, done=told)  # fmt: skip
    write_marks(output, found)
    bands = Counter(str(one["band"]) for one in found)
    click.echo(f"{output}: {len(found)} items; " + ", ".join(f"{bands[band]} {band}" for band in BANDS))
    if samples < 64:
        click.echo(f"{samples} answers to an item tell bands apart poorly; 64 or more are better.")
