"""The events that a running step emits: typed here, one JSON line each between processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Event:
    """Something that happened to a step, which its `label` names."""

    label: str

    def line(self) -> str:
        """As JSON, for another process to parse."""
        return json.dumps({"event": type(self).__name__, **asdict(self)})


@dataclass(frozen=True)
class Note(Event):
    """What the step is doing, in words."""

    text: str


@dataclass(frozen=True)
class Waiting(Note):
    """What the step waits for; silence after it does not count as a hang."""


@dataclass(frozen=True)
class Warned(Event):
    """A warning about the step's result."""

    text: str


@dataclass(frozen=True)
class Progress(Event):
    """How many units of the step's work are done."""

    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class Trained(Event):
    """How many steps of a training are done, and the last one's loss and speed."""

    done: int
    total: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class Failed(Event):
    """The step failed: the error message and the exit code."""

    text: str
    code: int


@dataclass(frozen=True)
class Exited(Event):
    """The step's process ended: its exit code, or minus the signal that killed it."""

    code: int


Emit = Callable[[Event], None]
KINDS = {kind.__name__: kind for kind in (Note, Waiting, Warned, Progress, Trained, Failed, Exited)}


def parse(line: str | bytes) -> Event | None:
    """The event of a JSON line; None for any other line, such as a library's print."""
    try:
        fields = json.loads(line)
        return KINDS[fields.pop("event")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
