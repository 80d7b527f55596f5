"""From steps to the engine's jobs: command lines, logs, devices, and the meaning of exit codes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from btx.engines.local import Ended, Job, Local
from btx.errors import ArtifactError, BtxError, DivergedError, InterruptedRunError, RecipeError, ResourceError
from btx.events import Emit
from btx.graph.job import freeze
from btx.graph.step import Step
from btx.recipe.paths import expanded
from btx.recipe.settings import RunSettings

BY_CODE = {e.exit_code: e for e in (RecipeError, ArtifactError, DivergedError, ResourceError, InterruptedRunError)}
PR_SET_PDEATHSIG = 1
LAUNCHER = "from btx.graph.launch import accelerate_launch; accelerate_launch()"  # for python -c


def die_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def accelerate_launch() -> None:
    """Run `accelerate launch` in this process, and end with the parent: else its workers would outlive btx."""
    die_with_parent()
    from accelerate.commands.launch import main

    main()


READY = (
    *("torch", "accelerate", "transformers.generation.utils", "transformers.models.mixtral.modeling_mixtral"),
    *("pyarrow.parquet", "btx_kernels.sorted", "btx.cli.main", "btx.conversions.registry", "btx.training.loop"),
)  # what jobs import, seconds of work; importing them computes nothing


ROLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *(f"{kind}_COMM_WORLD_{what}" for kind in ("OMPI", "MV2") for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
)  # from which accelerate and torch guess that they are one of several processes


def own_rank(launched: bool) -> int:
    """This process's rank: RANK if btx's own launcher set it, else 0, with all rank variables removed.

    A Kubernetes pod or a Slurm step may have RANK=3 set; a training that believed it would wait forever for the others.
    """
    if launched:
        return int(os.environ.get("RANK", "0"))
    for name in ROLES:
        os.environ.pop(name, None)
    return 0


def end_process(code: int = 0) -> None:
    """End a process of a distributed training at once; its work is already published or saved.

    Python's own shutdown sometimes aborts on threads of the collectives (seen with gloo: `terminate called without an
    active exception`) or waits for them forever, and a finished step would be reported as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Launcher:
    """Starts steps as jobs of the local engine."""

    def __init__(self, where: RunSettings, emit: Emit) -> None:
        self.where, self.emit = where, emit
        self.devices = _gpus() if where.device != "cpu" else 0
        self.slots = where.workers if where.workers != "auto" else max(1, self.devices if not where.launch else 1)

    def __call__(self, steps: list[Step], more: Callable[[], list[Step]]) -> None:
        """Run all steps and, with several slots, those that become ready meanwhile; an error names the job's log.

        With a single slot, later steps that do not train run in the scheduler's own process, which costs less.
        """
        slots, devices = self.slots, self.devices
        threads = self._threads(min(slots, len(steps))) if not devices else None
        memory = memory_here() if slots > 1 and not devices else None  # each GPU has its own
        jobs = [self._job(step, threads, memory) for step in steps]

        def further() -> list[Job]:
            added = [self._job(step, threads, memory) for step in more()] if slots > 1 else []
            jobs.extend(added)
            return added

        raise_failed(Local(slots, devices=devices, memory=memory).run(list(jobs), self.emit, further), jobs)

    def _threads(self, slots: int) -> int | None:
        """Share this machine's cores among jobs that run at once; None for all, or as the recipe says."""
        if slots < 2 or self.where.threads != "auto":
            return None
        return max(1, len(os.sched_getaffinity(0)) // slots)

    def _job(self, step: Step, threads: int | None, memory: int | None) -> Job:
        config = self.where.launch if step.trains else None
        start = [sys.executable]
        if config:
            start += ["-c", LAUNCHER, "--config_file", str(expanded(config, "run.launch").absolute())]
        told = ["--launched"] if config else []
        argv = [*start, "-m", "btx", "_step", str(freeze(step, threads=threads)), *told]
        patience = 60 * self.where.hang_minutes if step.trains else None
        needs = step.needs if memory else 0  # estimating it takes seconds of imports
        return Job(
            step.label, argv, step.log_file, launcher=bool(config), memory=needs, patience=patience,
            imports=() if self.devices else READY,
        )  # fmt: skip


def memory_here() -> int:
    """Bytes of memory that this process and its children may use: the machine's, or its cgroup's limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # another system, or "max"
        return machine


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _sentence(label: str, end: Ended, log: Path) -> str:
    """How one job failed, with the path of its log."""
    seen = f" Log: {log}" if log.exists() else ""
    if end.code == InterruptedRunError.exit_code:
        return f"{label}: {end.error.removeprefix(f'{label} ')}{seen}"
    if end.code == -signal.SIGKILL:
        return (
            f"{label} was killed (signal 9), as the system does when memory runs out. Add memory, lower "
            f"run.micro_batch or run.workers, or set train.gradient_checkpointing: true.{seen}"
        )
    why = end.error.removeprefix(f"{label}: ") or "see its log."
    return f"{label} failed (exit code {end.code}): {why}{seen}"


def raise_failed(ended: dict[str, Ended], jobs: list[Job]) -> None:
    """Raise the errors of the failed jobs, each with its log; the message also names the jobs that are done."""
    failed = {job.label: (ended[job.label], job.log) for job in jobs if ended[job.label].code}
    if not failed:
        return
    kinds = [
        ResourceError if end.code == -signal.SIGKILL else BY_CODE.get(end.code, BtxError) for end, _ in failed.values()
    ]
    real = [kind for kind in kinds if kind is not InterruptedRunError]
    lines = [_sentence(label, end, log) for label, (end, log) in failed.items()]
    others = sorted(set(ended) - set(failed))
    tail = f"\nThe others are done: {', '.join(others)}." if others else ""
    error = (real or kinds)[0]("\n".join(lines) + tail)
    if isinstance(error, DivergedError):
        error.failed = tuple(label for label, (end, _) in failed.items() if end.code == DivergedError.exit_code)
    raise error
