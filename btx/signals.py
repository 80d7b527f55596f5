"""The first signal asks a training to stop after its current step; a second one ends the process at once.

All other work is interrupted immediately, by SIGTERM or SIGHUP as by Ctrl-C, so that unfinished folders are removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDED_AT_ONCE = 130


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """The signals to handle: all of `numbers` except a SIGHUP that is already ignored, as under `nohup`."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class Interrupted(KeyboardInterrupt):
    """What a signal raises, a subclass on purpose.

    Once Python's own KeyboardInterrupt has passed through an `exec` of source text (importing a dataclass is enough),
    `python -m` dies by SIGINT whatever the exit code, even if the exception was caught; it checks for that exact class.
    """


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Interrupted; trainings handle them with Stop instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in heeded(INTERRUPTING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted


class Stop:
    """While it is open, watched signals do not end the process; the first one's name goes to `asked`, else empty."""

    def __init__(self) -> None:
        self.asked = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in heeded(WATCHED)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            os._exit(ENDED_AT_ONCE)
        self.asked = signal.Signals(number).name
