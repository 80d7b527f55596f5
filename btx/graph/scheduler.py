"""The scheduler: runs the unfinished steps, parents first, and links published folders to short names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from btx.errors import ArtifactError, DivergedError, ResourceError
from btx.events import Emit
from btx.graph.step import Step, undone

More = Callable[[], list[Step]]
Launch = Callable[[list[Step], More], None]


def run_steps(steps: list[Step], *, launch: Launch, emit: Emit, several: bool = False) -> int:
    """Run the unfinished steps, parents first; returns the number of steps run.

    `launch` gets all ready steps as soon as one of them trains, and a function that returns the steps that have become
    ready since, for an engine with free slots. While no job runs, other steps run in this process, one at a time. A
    failed job leaves the others running; its error is raised at the end. `several` says that `launch` has more than one
    slot: then steps that are ready beside a training start with it, instead of before it.
    """
    built: set[str] = set()

    def ready() -> list[Step]:  # recomputed each time: a rebuilt parent makes its children stale
        todo = undone(steps)
        waiting = {step.key for step in todo}
        once = {step.key: step for step in reversed(todo) if not waiting & {p.key for p in step.parents.values()}}
        found = [step for step in todo if once.get(step.key) is step]
        return sorted(found, key=lambda step: not step.trains) if several else found  # the longest first

    def begun(some: list[Step]) -> list[Step]:
        built.update(step.key for step in some)
        return some

    while found := ready():
        beside = several and found[0].trains
        chosen = found if beside else [step for step in found if not step.trains][:1] or found
        if again := [step.label for step in chosen if step.key in built]:
            raise ArtifactError(
                f"{', '.join(again)}: done, and undone again within one run. Make sure that nobody else changes "
                f"{steps[0].root}, then run the same command again."
            )
        begun(chosen)
        if chosen[0].trains:
            launch(chosen, lambda: begun([step for step in ready() if step.key not in built]))
        else:
            _build(chosen[0], emit)
    return len(built)


def _build(step: Step, emit: Emit) -> None:
    """Build a step in this process; a DivergedError says which, as one of a job does."""
    try:
        step.build(emit)
    except DivergedError as error:
        error.failed = (step.label,)
        raise


def link(step: Step) -> None:
    """Point a step's short name, such as runs/demo/export, to its published folder by a symbolic link."""
    short = step.short
    fresh = short.with_name(f".{short.name}.{os.getpid()}")
    target = Path("steps") / step.folder.name
    if short.is_symlink() and Path(os.readlink(short)) == target:
        return
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(target)
        fresh.replace(short)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        said = f"{short} cannot be made a link to {target}: {error.strerror}."
        raise ResourceError(f"{said} Move away what is there, then run the same command again.") from error
