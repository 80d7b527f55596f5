"""Benchmarks, one per file: medians over rounds, as ratios to a peer or a physical limit measured in the same run."""

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
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def apart(module: str, about: dict[str, Any]) -> dict[str, Any]:
    """The result of a module's `run(about)`, called in a fresh process."""
    code = f"import sys, json; from {module} import run; print(json.dumps(run(json.loads(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(about)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{about['name']} failed:\n{done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row
