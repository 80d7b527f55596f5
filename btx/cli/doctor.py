"""`btx doctor`: what this machine and environment support, and what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from btx.graph.step import versions
from btx.tasks.enclosed import NotEnclosedError

OPTIONAL = {
    "tensorboard": "run.report_to: [tensorboard]",
    "wandb": "run.report_to: [wandb]",
    "lm-eval": "btx lm-eval",
}


def report() -> Iterator[str]:
    """Lines to print, one finding each."""
    import torch

    from btx.models.kernels import absent, choose, known
    from btx.recipe.precision import automatic
    from btx.tasks.canaries import require

    yield "versions    " + ", ".join(f"{n} {v}" for n, v in versions().items())
    yield f"cpu         {len(os.sched_getaffinity(0))} cores, {_memory()} of memory"
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(n)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            yield f"gpu {n}       {about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}"
    else:
        yield f"gpu         none: trainings run on the CPU, in {automatic('cpu')}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = {name: why for name in known() if (why := absent(name, device))}
    yield f"kernels     {', '.join(n for n in known() if n not in missing)}; auto is {choose('auto', device)}"
    for name, why in missing.items():
        yield f"  not here  {name}: {why}"
    try:
        require()
        yield "sandbox     holds: tasks of kind code can be run"
    except NotEnclosedError as error:
        yield f"sandbox     none: {error}"
    yield f"disk        {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here"
    there = {found.name for found in distributions()}  # not find_spec: it finds the folders that trackers leave
    for package, use in OPTIONAL.items():
        yield f"{'present' if package in there else 'absent':<11} {package} ({use})"


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.0f} GiB"
