"""Writes a training's metrics.jsonl, feeds its trackers, and emits its progress.

One JSON object per step, appended; after a resume the lines past the restored step are dropped, so the file equals that
of an uninterrupted run but for times and speeds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from btx.events import Emit, Trained

FILE = "metrics.jsonl"
TELL_EVERY = 0.5  # seconds


class Metrics:
    """Writes one line per step, hands it to the trackers, and emits progress at intervals."""

    def __init__(self, work: Path, *, label: str, total: int, emit: Emit, loop: Any) -> None:
        self.label, self.total, self.emit, self.loop = label, total, emit, loop
        self.main = loop.accelerator.is_main_process
        self.started = self.told = time.monotonic()
        self.first = loop.step
        if self.main:
            work.mkdir(parents=True, exist_ok=True)
            self.file = open_at(work / FILE, loop.step)
        if loop.where.report_to:
            loop.accelerator.init_trackers(label.replace(":", "-"), config=_plain(loop.settings.model_dump()))

    def record(self, figures: dict[str, Any]) -> None:
        """Record one step's figures."""
        now = time.monotonic()
        steps = figures["step"] - self.first
        figures["tokens_per_second"] = round(steps * self.loop.settings.batch_tokens / max(now - self.started, 1e-9), 1)
        if self.main:
            self.file.write(json.dumps(_finite(figures)) + "\n")
            self.file.flush()
        if self.loop.where.report_to:
            numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
            self.loop.accelerator.log(numbers, step=figures["step"])
        if self.main and (now - self.told > TELL_EVERY or figures["step"] in (1, self.total)):
            self.told = now
            self.emit(Trained(self.label, figures["step"], self.total, figures["loss"], figures["tokens_per_second"]))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self.main:
            self.file.close()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers accept them: numbers and text."""
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN: write such a number as text."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value


def open_at(path: Path, step: int) -> Any:
    """The file, opened to append after the line of `step`; a torn last line is dropped too."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")
