"""How lm-eval judges MBPP here: the completion is run with its tests in btx's sandbox."""

from __future__ import annotations

from typing import Any

from btx.tasks.answers import program
from btx.tasks.sandbox import run


def passed(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for a completion whose program passes the item's tests, else 0."""
    parts = [doc["test_setup_code"], program(results[0]), "\n".join(doc["test_list"])]
    return {"pass_at_1": float(run(parts).passed)}
