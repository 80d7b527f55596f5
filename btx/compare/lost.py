"""Steps that diverged: a result like any other, remembered beside their work, so that it is not come to again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from btx.graph.step import Step


def marker(step: Step) -> Path:
    """The file that says that a step diverged, and how; whoever removes it has the step tried again."""
    return step.work.with_name(f"{step.work.name}.diverged")


class Lost:
    """Which steps diverged, or rest on one that did, in this run or an earlier one."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}  # by key

    def add(self, steps: Iterable[Step], why: str) -> None:
        """Remember steps that diverged."""
        for step in steps:
            marker(step).parent.mkdir(parents=True, exist_ok=True)
            marker(step).write_text(why + "\n", encoding="utf-8")
        self._known.clear()

    def __contains__(self, step: Step) -> bool:
        if step.key not in self._known:
            here = marker(step).exists() and not step.exists
            self._known[step.key] = here or any(parent in self for parent in step.parents.values())
        return self._known[step.key]
