"""A first signal asks a training to stop after its step; a second one ends the process at once.

Everything else is interrupted where it stands, by SIGTERM or a hang-up as by Ctrl-C, so that unfinished folders are
removed.
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
    """Of some signals those to answer: not a SIGHUP that is ignored, which is what `nohup` asks for."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class Interrupted(KeyboardInterrupt):
    """What a signal raises.

    Where Python's own KeyboardInterrupt passes through an `exec` of source text (a dataclass made by an import is
    enough), `python -m` ends by SIGINT whatever the exit code asked for, although the exception was caught; it looks
    for that very class.
    """


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Interrupted; trainings watch for them on their own (Stop)."""
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
    """While it is open, the watched signals are noted in `asked` (the signal's name, or empty) instead of killing."""

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
