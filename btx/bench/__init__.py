"""Measurements, one kind a file: ratios to a peer or a physical limit taken in the same run, medians of many."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
