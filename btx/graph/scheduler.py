"""The scheduler: what is not done is run, parents first, and what is published gets its short name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from btx.errors import ArtifactError, ResourceError
from btx.graph.step import Step, Tell, undone

Launch = Callable[[list[Step]], None]


def run_steps(steps: list[Step], *, launch: Launch, tell: Tell) -> int:
    """Run what is not done, parents first; trainings that depend on nothing unfinished go to `launch` together.

    Returns how many steps were run. An error of one training leaves the others running and is raised at the end.
    """
    built: set[str] = set()
    while todo := undone(steps):  # asked again each time: a parent made anew may have other bytes than its children's
        waiting = {s.label for s in todo}
        ready = [s for s in todo if not waiting & s.parents.keys()]
        chosen = [s for s in ready if not s.trains][:1]
        if again := [s.label for s in chosen or ready if s.label in built]:
            raise ArtifactError(
                f"{', '.join(again)}: done, and undone again within one run. See that nobody else changes "
                f"{steps[0].root}, then run the same command again."
            )
        built |= {s.label for s in chosen or ready}
        if chosen:
            chosen[0].build(tell)
        else:
            launch(ready)
    return len(built)


def link(root: Path, step: Step) -> None:
    """Give a published folder its short name, such as runs/demo/export, as a symbolic link."""
    short, fresh = root / step.kind, root / f".{step.kind}.{os.getpid()}"
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
