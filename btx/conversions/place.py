"""Checks that this machine has what `run` names: device, kernel, launch file, trackers, a writable folder."""

from __future__ import annotations

import os
from pathlib import Path

from btx.errors import RecipeError, ResourceError, nearest
from btx.recipe.paths import expanded
from btx.recipe.settings import RunSettings

ALONE = ("NO", "MULTI_CPU")  # accelerate's distributed types that start a single process (without MPI)


def check_place(run: RunSettings, root: Path) -> None:
    """RecipeError or ResourceError if a kernel, device, launch file, tracker or folder of `run` cannot be used."""
    from btx.models.kernels import choose
    from btx.models.model import device_of

    choose(run.kernel, device_of(run))
    if run.launch:
        check_launch(expanded(run.launch, "run.launch").absolute())
    check_trackers(run.report_to)
    above = next(p for p in (root, *root.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ResourceError(f"run.directory: {above} is not a writable folder. Choose another one.")


def check_launch(path: Path) -> None:
    """RecipeError unless `accelerate launch` accepts the file and starts as many processes as the file states."""
    if not path.is_file():
        raise RecipeError(
            f"run.launch: there is no file {path}. `accelerate config` writes one; relative paths start at the "
            "working directory."
        )
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        about = load_config_from_file(str(path))
    except Exception as error:  # accelerate validates little, so bad content raises many types
        why = " ".join(str(error).split())
        raise RecipeError(f"run.launch: accelerate cannot read {path} ({why}). Write it anew.") from error
    kind = str(getattr(about.distributed_type, "value", about.distributed_type))
    if kind in ALONE and int(about.num_processes or 1) > 1:
        raise RecipeError(
            f"run.launch: {path} asks for {about.num_processes} processes, but accelerate starts only one "
            f"under distributed_type: {kind}. Set MULTI_GPU (on CPUs with use_cpu: true) or FSDP."
        )


def check_trackers(names: list[str]) -> None:
    """RecipeError for a tracker that accelerate does not know, or whose package is not installed (it would skip it)."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    at_hand = [str(t) for t in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RecipeError(f"run.report_to: there is no tracker {name!r}; {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in at_hand:
            raise RecipeError(f"run.report_to: the package of the tracker {name} is not installed. Install it first.")
