"""The command line: one verb per stage, and run, compare, status, path, plan, check, import, push, doctor, init,
schema, text, bench, moe, lm-eval, chat, passrate.

Heavy imports wait until a verb needs them, so that `btx --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from btx import __version__
from btx.cli.bench import bench
from btx.cli.chat import chat
from btx.cli.command import Command
from btx.cli.lm_eval import lm_eval
from btx.cli.moe import moe
from btx.cli.passrate import passrate
from btx.cli.terminal import plain_where_needed
from btx.cli.transfer import import_, push
from btx.conversions import STAGES
from btx.errors import BtxError, full_disks_told

if TYPE_CHECKING:
    from btx.conversions.pipeline import Graph

RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
SET = click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a value of the recipe.")


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """From a seed checkpoint and its domains to one Mixture-of-Experts checkpoint (Branch-Train-MiX).

    Exit codes: 0 done, 2 usage or recipe, 3 bad checkpoint, 4 diverged, 5 resources, 75 interrupted (run again).
    """
    # Threads that spin while they wait make a busy machine twenty times slower (403 against 9,100 tokens/s of a small
    # model with two threads on two cores, one of them taken). OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    plain_where_needed()


def graph_of(recipe: Path, overrides: tuple[str, ...]) -> Graph:
    """The step graph of a recipe file; its relative paths start at the file's folder."""
    from btx.conversions.pipeline import Graph
    from btx.conversions.registry import load_recipe

    return Graph(load_recipe(recipe, list(overrides)), recipe.absolute().parent)


def carry_out(recipe: Path, overrides: tuple[str, ...], stage: str, domain: str | None) -> None:
    """Run every unfinished step that a stage needs, then print the result."""
    from btx.graph.launch import Launcher
    from btx.graph.scheduler import link, run_steps
    from btx.graph.step import undone
    from btx.report.progress import for_person

    graph = graph_of(recipe, overrides)
    if stage == "export" and "export" in graph.steps:
        graph.export_unmeasured()
    steps = graph.needed(graph.labels(stage, domain))
    todo = undone(steps)
    graph.check(todo)
    if todo:
        graph.digests.save()
        with for_person() as person:
            launcher = Launcher(graph.recipe.run, person.emit)
            run_steps(steps, launch=launcher, emit=person.emit, several=launcher.slots > 1)
    for step in steps:  # even with nothing to do: the previous run may have been of another recipe
        link(step)
    finish(graph, stage, domain, len(todo))


def finish(graph: Graph, stage: str, domain: str | None, count: int) -> None:
    """Print what a stage produced."""
    if not graph.labels(stage, domain):
        which = f"the expert of domain {domain}" if domain else "every expert"
        click.echo(f"Nothing to train: {which} has a checkpoint, which is checked and merged as it is.")
        return
    if not count:
        click.echo(f"Everything is done already: {graph.recipe.name}, {stage}{f' {domain}' if domain else ''}.")
    if stage in ("report", "export"):
        from btx.report.console import show

        if graph.steps["report"].done:
            show(graph.root / "report", graph.root / "export")
            return
    for label in graph.labels(stage, domain):
        click.echo(f"{label}: {graph.steps[label].folder}")


@main.command()
@RECIPE
@SET
@click.option("--until", metavar="STEP", default="report", help=f"Stop after this stage: {', '.join(STAGES)}.")
def run(recipe: Path, overrides: tuple[str, ...], until: str) -> None:
    """Run the recipe; finished steps are reused."""
    stage, _, domain = until.partition(":")
    carry_out(recipe, overrides, stage, domain or None)


def _stage(name: str, about: str) -> None:
    @main.command(name, help=about)
    @RECIPE
    @SET
    @click.option("--domain", metavar="NAME", hidden=name != "train", help="Only this domain.")
    @click.option(
        "--max-memory", metavar="SIZE", hidden=name != "merge", help="Short for --set run.max_memory=SIZE: 4GiB."
    )
    def verb(recipe: Path, overrides: tuple[str, ...], domain: str | None, max_memory: str | None) -> None:
        if domain and name != "train":
            raise click.UsageError(f"--domain belongs to train; {name} is one step for all domains.")
        if max_memory:
            overrides = (*overrides, f"run.max_memory={max_memory}")
        carry_out(recipe, overrides, name, domain)


for _name, _about in {
    "branch": "Verify the seed (a builtin one is pretrained first) and write its lineage.",
    "train": "Train the experts, one job each; --domain trains one domain's, on any machine.",
    "merge": "Merge: feed-forward blocks become experts, all other weights are averaged.",
    "finetune": "Train the merged model and its router on all domains.",
    "evaluate": "Bits per byte of every model on every domain, and the routing.",
    "export": "Write the Hugging Face folder with model card, digests and proof (golden logits).",
    "report": "Write results, costs and charts as one HTML page.",
}.items():
    _stage(_name, _about)


@main.command()
@RECIPE
@SET
def compare(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Compare conversions of the seed at equal budgets, as the recipe's section `compare` says."""
    from btx.cli.compare import compare_recipe

    compare_recipe(recipe, overrides)


@main.command()
@RECIPE
@SET
def status(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Show the state of every step, its planned cost and its actual cost."""
    from btx.cli.plan import rows
    from btx.report.console import Planned, status_table

    graph = graph_of(recipe, overrides)
    planned = {}
    with suppress(BtxError):  # the states are worth printing even if the plan fails
        planned = {row.label: Planned(row.flops, row.memory, row.disk) for row in rows(graph.recipe, graph.base)}
    status_table(graph, planned)


@main.command()
@RECIPE
@click.argument("step")
@SET
def path(recipe: Path, step: str, overrides: tuple[str, ...]) -> None:
    """Print the folder of a step, such as train:math, merge or export."""
    graph = graph_of(recipe, overrides)
    stage, _, name = step.partition(":")
    labels = [step] if step in graph.steps else graph.labels(stage, name or None)
    for label in labels:
        click.echo(graph.steps[label].folder)


@main.command()
@RECIPE
@SET
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    help="Sustained TFLOP/s of one device; default: measured on a CPU whose seed is there, else 400.",
)
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="Devices per training.")
@click.option("--here", is_flag=True, help="Measure this machine's TFLOP/s instead of --tflops (a second).")
def plan(recipe: Path, overrides: tuple[str, ...], tflops: float | None, devices: int, here: bool) -> None:
    """Estimate tokens, FLOPs, time, memory and disk before anything runs."""
    from btx.cli.plan import compared, show_plan, sustained
    from btx.conversions.pipeline import resolved
    from btx.conversions.registry import load_recipe

    said, base = load_recipe(recipe, list(overrides)), recipe.absolute().parent
    read = resolved(said)
    speed = sustained(read, base, tflops, here=here)
    show_plan(read, base, tflops=speed, devices=devices)
    if said.compare:
        click.echo(compared(said, base, speed))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def check(folder: Path) -> None:
    """Verify an exported folder: digests, tensors, loading by the stock class, and the logits of its proof."""
    from btx.export.proof import check as check_export

    for line in check_export(folder):
        click.echo(f"ok  {line}")


@main.command()
def doctor() -> None:
    """Show what this machine and environment support, and what is missing."""
    from btx.cli.doctor import report

    for line in report():
        click.echo(line)


@main.command()
@click.argument("name")
def init(name: str) -> None:
    """Write NAME.yaml, a commented recipe to start from."""
    from btx.cli.template import write_template

    click.echo(f"{write_template(name)} is written. Next: edit it, then `btx plan {name}.yaml`.")


@main.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    import json

    from btx.conversions.registry import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--drills", is_flag=True, help="Write drills into FOLDER instead: text and items for pipelines/founding.yaml."
)
def text(folder: Path, drills: bool) -> None:
    """Write the builtin corpora to FOLDER/math, FOLDER/code and FOLDER/prose, for use as a recipe's data."""
    from btx.data import builtin
    from btx.data import drills as made

    if drills:
        made.write(folder)
        click.echo(f"{folder}: {made.DOCUMENTS:,} drills, and items to train on and to ask")
        return
    for name, (documents, size) in builtin.write(folder).items():
        click.echo(f"{folder / name}: {documents:,} documents, {size:,} bytes of text")


main.add_command(bench)
main.add_command(moe)
main.add_command(lm_eval)
main.add_command(chat)
main.add_command(passrate)
main.add_command(import_)
main.add_command(push)


@main.command("_step", hidden=True)
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--launched", is_flag=True, help="This process was started by accelerate launch.")
def one_step(job: Path, launched: bool) -> None:
    """Run one job in this process and write events as JSON lines: the worker that an engine starts."""
    from btx.conversions.registry import classes
    from btx.events import Failed
    from btx.graph.job import thaw
    from btx.graph.launch import die_with_parent, end_process, own_rank
    from btx.report.progress import Events

    die_with_parent()
    rank = own_rank(launched)
    events = Events()
    label = job.name.removesuffix(".job.json")
    try:
        step = thaw(job, classes())
        label = step.label
        with full_disks_told():
            step.build(events.emit, rank=rank)
    except BtxError as error:
        events.emit(Failed(label, str(error), error.exit_code))
        end_process(error.exit_code)
        sys.exit(error.exit_code)
    end_process()
