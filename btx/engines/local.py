"""Runs jobs as processes of this machine: one per slot, each with its device; a failed one leaves the others alone.

A job is a command line that writes events (`btx/events.py`) as lines to its standard output; its standard error goes to
its log. Jobs have sessions of their own, so the terminal does not signal them: the engine forwards the first signal
once, and they save their state.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btx.engines.processes import Process, start
from btx.events import Emit, Event, Exited, Failed, Note, Trained, Waiting, Warned, parse
from btx.signals import Stop

HUNG = 5  # exit code of a job that hung twice, the same as ResourceError's
LAUNCHER_FAILED = 1  # exit code of torchrun and the like, whatever their workers' exit codes were


VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # NVIDIA's; AMD's, if they are set


def allowed(visible: str | None, devices: int) -> list[str]:
    """The devices that a user may use, as CUDA_VISIBLE_DEVICES names them (numbers or UUIDs); all where it is not set.

    `devices` is the number of usable ones: CUDA ignores all entries after an invalid one.
    """
    if not visible:
        return [str(number) for number in range(devices)]
    return [name.strip() for name in visible.split(",")][:devices]


@dataclass(frozen=True)
class Job:
    """A process to start."""

    label: str
    argv: list[str]
    log: Path
    launcher: bool = False  # whether it launches workers, whose exit codes its own one hides
    memory: int = 0  # estimated peak, in bytes
    patience: float | None = None  # seconds without an event after which it counts as hung; None: no limit
    imports: tuple[str, ...] = ()  # modules that a process which starts jobs by forking has ready


@dataclass
class Ended:
    """How a job ended: its exit code (negative: the signal that killed it) and the error it reported, if any."""

    code: int
    error: str = ""
    hung: Job | None = None  # the job, where it was killed because it hung


@dataclass
class _Running:
    job: Job
    process: Process
    slot: int
    error: str = ""
    code: int = 0  # the exit code that it reported with its error
    asked: bool = False
    heard: float | None = field(default_factory=time.monotonic)  # time of the last event; None while silence is allowed
    hung: bool = False


class Local:
    """Runs up to `slots` jobs at once, within `memory` bytes; with several GPUs each slot sees one of them."""

    def __init__(self, slots: int, *, devices: int = 0, memory: int | None = None) -> None:
        self.slots, self.devices, self.memory = slots, devices, memory
        self.again: set[str] = set()  # labels of jobs that hung once and were started again

    def run(self, jobs: list[Job], emit: Emit, more: Callable[[], list[Job]] = list) -> dict[str, Ended]:
        """Run all jobs until they end; after a signal no more are started, and the running ones are asked to stop.

        A job that hangs (`Job.patience`) is killed and restarted once, while the others continue. `more` is called for
        further jobs whenever one has ended and none has failed, as long as others run or there are several devices:
        with one device and nothing else running, a separate process gains nothing.
        """
        waiting, running, ended = list(jobs), dict[str, _Running](), dict[str, Ended]()
        events: queue.Queue[tuple[str, Event | None]] = queue.Queue()
        with Stop() as stop:
            while running or (waiting and not stop.asked):
                while not stop.asked and (job := self._next(waiting, running)):
                    waiting.remove(job)
                    running[job.label] = self._start(job, self._free(running), events)
                    emit(Note(job.label, f"starts; log: {job.log}"))
                for one in running.values():
                    if stop.asked and not one.asked:
                        one.asked = True
                        one.process.send_signal(signal.SIGTERM)
                    _kill_hung(one)
                beside = self._take(events, running, ended, emit) and (running or self.devices > 1)
                waiting += self._hung(ended, emit)
                if beside and not any(one.code for one in ended.values()):
                    waiting += more()
        for job in waiting:
            ended[job.label] = Ended(os.EX_TEMPFAIL, "not started, as the run was asked to stop.")
        return ended

    def _hung(self, ended: dict[str, Ended], emit: Emit) -> list[Job]:
        """Remove from `ended` the jobs that hung for the first time; returns them, to be restarted."""
        found = [end.hung for end in ended.values() if end.hung and end.hung.label not in self.again]
        for job in found:
            self.again.add(job.label)
            del ended[job.label]
            emit(Warned(job.label, f"{_silent(job)}: killed and started again"))
        return found

    def _next(self, waiting: list[Job], running: dict[str, _Running]) -> Job | None:
        """The first job that fits the free slots and memory; a job that runs alone may exceed the memory."""
        if len(running) == self.slots:
            return None
        taken = sum(one.job.memory for one in running.values())
        fits = (job for job in waiting if not running or not self.memory or taken + job.memory <= self.memory)
        return next(fits, None)

    def _free(self, running: dict[str, _Running]) -> int:
        return min(set(range(self.slots)) - {one.slot for one in running.values()})

    def _start(self, job: Job, slot: int, events: queue.Queue[Any]) -> _Running:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.devices > 1 and self.slots > 1:
            limits = [name for name in VISIBLE if env.get(name)] or VISIBLE[:1]
            for name in limits:
                names = allowed(env.get(name), self.devices)
                env[name] = names[slot % len(names)]
        process = start(job.argv, job.log, env, imports=job.imports)
        threading.Thread(target=_listen, args=(job.label, process, events), daemon=True).start()
        return _Running(job, process, slot)

    @staticmethod
    def _take(events: queue.Queue[Any], running: dict[str, _Running], ended: dict[str, Ended], emit: Emit) -> bool:
        """Handle one event; returns whether it was the end of a job."""
        try:
            label, event = events.get(timeout=0.2)
        except queue.Empty:
            return False
        if event is None:
            one = running.pop(label)
            ended[label] = _end(one)
            emit(Exited(label, ended[label].code))
            return True
        one = running[label]
        patient = isinstance(event, Waiting) or (isinstance(event, Trained) and event.done == event.total)
        one.heard = None if patient else time.monotonic()
        if isinstance(event, Failed):
            one.error, one.code = event.text, event.code
        else:
            emit(event)
        return False


def _end(one: _Running) -> Ended:
    """How a job ended; if a launcher hides its worker's exit code, with the one that the worker reported.

    A job that our signal hit outside its training loop has nothing to save; it counts as interrupted like the others.
    """
    code = one.process.wait()
    if one.hung and code:
        return Ended(HUNG, f"{_silent(one.job)}, and hung again after a restart.", one.job)
    hidden = one.job.launcher and code == LAUNCHER_FAILED
    if one.asked and not one.error and (hidden or code == -signal.SIGTERM):
        return Ended(
            os.EX_TEMPFAIL, "was asked to stop. Run the same command again to resume from its last saved state."
        )
    return Ended((one.code or code) if hidden else code, one.error)


def _silent(job: Job) -> str:
    return f"sent no event for {(job.patience or 0) / 60:g} minutes"


def _kill_hung(one: _Running) -> None:
    """Kill a job that is silent for longer than its patience, with its whole process group."""
    if one.job.patience and one.heard is not None and time.monotonic() - one.heard > one.job.patience and not one.hung:
        one.hung = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)


def _listen(label: str, process: Process, events: queue.Queue[Any]) -> None:
    assert process.stdout
    with process.stdout as lines:
        for line in lines:
            if event := parse(line):
                events.put((label, event))
    process.closed()
    events.put((label, None))
