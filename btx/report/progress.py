"""Progress while steps run: bars on a terminal, plain timestamped lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from btx.events import Event, Exited, Note, Progress, Trained, Warned

PLAIN_EVERY = 10.0  # seconds between two lines of one training


class Lines:
    """Timestamped lines on standard error."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def emit(self, event: Event) -> None:
        """Print an event; progress at most every PLAIN_EVERY seconds, and always the last."""
        if isinstance(event, (Trained, Progress)):
            now = time.monotonic()
            if now - self.last.get(event.label, -PLAIN_EVERY) < PLAIN_EVERY and event.done != event.total:
                return
            self.last[event.label] = now
        if text := _words(event):
            print(f"{time.strftime('%H:%M:%S')}  {event.label:<16} {text}", file=sys.stderr, flush=True)


def _words(event: Event) -> str:
    match event:
        case Trained():
            speed = f"{event.tokens_per_second:,.0f} tokens/s"
            return f"step {event.done}/{event.total}  loss {event.loss:.3f}  {speed}"
        case Progress():
            return f"{event.done:,} of {event.total:,} {event.unit}"
        case Exited():
            return f"ended with exit code {event.code}" if event.code else ""
        case Warned():
            return f"warning: {event.text}"
        case Note():
            return event.text
    return ""


class Bars:
    """One progress bar per step with loss, speed and time left; other events as lines above."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<14}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
            console=self.console,
        )  # fmt: skip
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.progress.stop()

    def emit(self, event: Event) -> None:
        """Show an event."""
        label = event.label
        if isinstance(event, (Trained, Progress)):
            if label not in self.tasks:
                self.tasks[label] = self.progress.add_task(label, total=event.total, loss="", rate="")
            fields: dict[str, Any] = {"rate": event.unit} if isinstance(event, Progress) else {
                "loss": f"loss {event.loss:.3f}", "rate": f"{event.tokens_per_second:,.0f} tok/s"
            }  # fmt: skip
            self.progress.update(self.tasks[label], completed=event.done, total=event.total, **fields)
        elif text := _words(event):
            self.progress.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim]  {label:<14} {text}", highlight=False)


class Events:
    """JSON lines on standard output, for the engine that started this process."""

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def emit(self, event: Event) -> None:
        """Write an event as one line; a broken pipe is ignored, since a signal to stop is on its way."""
        try:
            sys.stdout.write(event.line() + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def for_person() -> Lines | Bars:
    """Bars on a terminal, lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()
