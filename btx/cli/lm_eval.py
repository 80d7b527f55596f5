"""`btx lm-eval`: lm-eval's local tasks on an export or a composed model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from btx.errors import ArtifactError, ResourceError


@click.command("lm-eval")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, metavar="NAME,...", help="Tasks that files in the folder define.")
@click.option("--include", required=True, type=click.Path(path_type=Path), metavar="FOLDER",
              help="Folder with the tasks' YAML files; it may hold Python that they name, which is run.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="The first so many items of each task.")
@click.option("--chat", is_flag=True, help="Ask in the tokenizer's chat template.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write the results, with every sample, as JSON.")  # fmt: skip
def lm_eval(
    model: Path, tasks: str, include: Path, limit: int | None, chat: bool, device: str, output: Path | None
) -> None:
    """Score MODEL, an export or a composed model's folder, with lm-eval on local tasks, in float32, offline."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ[name] = "1"  # these packages read it when they are imported
    try:
        from btx.tasks.harness import OpenedLM, as_json, evaluate, table
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "btx":
            raise
        raise ResourceError(
            f"lm-eval cannot be imported ({error}). Install it beside btx: pip install 'btx[lm-eval]'."
        ) from error
    from btx.conversions.registry import open_model
    from btx.data.encoder import load_tokenizer
    from btx.recipe.settings import RunSettings

    if not model.is_dir():
        raise ArtifactError(f"there is no folder {model}. Name an export, or the folder of a composed model.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    where = RunSettings.model_validate({"device": device})
    with open_model(model, where=where) as opened:
        scorer = OpenedLM(opened, load_tokenizer(model), model)
        results = evaluate(scorer, names, include, limit=limit, chat=chat)
    click.echo(table(results))
    if output:
        output.write_text(json.dumps(results, indent=2, default=as_json, ensure_ascii=False), encoding="utf-8")
        click.echo(f"{output} has the results, and every sample.")
