"""Measurements, one kind a file: ratios to a peer or a physical limit taken in the same run, medians of many."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from btx.graph.cost import forget_peak as forget_peak
from btx.graph.cost import resident as resident


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def apart(module: str, about: dict[str, Any]) -> dict[str, Any]:
    """What a module's `run(about)` returns in a process of its own."""
    code = f"import sys, json; from {module} import run; print(json.dumps(run(json.loads(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(about)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{about['name']} failed:\n{done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row
