"""`btx compare`: what each conversion of a seed gains and costs, at rates chosen alike for all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from btx.graph.step import Step


def compare_recipe(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Run what is not done of a comparison, and say what came out."""
    from btx.cli.plan import compared, sustained
    from btx.compare.checks import check_arms
    from btx.compare.rounds import Rounds
    from btx.conversions.pipeline import resolved
    from btx.conversions.registry import load_recipe
    from btx.graph.launch import Launcher
    from btx.graph.scheduler import link, run_steps
    from btx.graph.step import undone
    from btx.report.comparison_console import show
    from btx.report.progress import for_person

    rounds = Rounds(load_recipe(recipe, list(overrides)), recipe.absolute().parent)
    rounds.check()
    check_arms(rounds)
    speed = sustained(resolved(rounds.recipe), rounds.base, None, here=False)
    click.echo(compared(rounds.recipe, rounds.base, speed), err=True)

    def carry(title: str, steps: list[Step]) -> None:
        todo = undone(steps)
        if not todo:
            return
        trained = sum(step.trains for step in todo)
        click.echo(f"{title}; {trained} trainings and {len(todo) - trained} other steps to do", err=True)
        with for_person() as person:
            launcher = Launcher(rounds.recipe.run, person.emit)
            run_steps(steps, launch=launcher, emit=person.emit, several=launcher.slots > 1)

    found = rounds.run(carry, lambda said: click.echo(said, err=True))
    link(found)
    show(found.folder, found.short)
