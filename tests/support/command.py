"""The real command in its own process, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BTX = [sys.executable, "-m", "btx"]


def btx(*argv: object, cwd: Path, code: int = 0, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command and expect an exit code."""
    done = subprocess.run(
        [*BTX, *map(str, argv)], cwd=cwd, capture_output=True, text=True, check=False, timeout=seconds
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def results(folder: Path) -> Any:
    """The report's results.json."""
    return json.loads((folder / "runs/pico/report/results.json").read_text())


def wait_for_step(root: Path, step: int) -> None:
    """Wait until the training has written that many lines of metrics."""
    for _ in range(1200):
        for file in root.glob("work/train-*/metrics.jsonl"):
            if len(file.read_text().splitlines()) >= step:
                return
        time.sleep(0.05)
    raise AssertionError("the training did not start")


def wait_until_free(path: Path) -> None:
    """Wait until no process holds the lock: a worker dies with its parent, but not instantly."""
    import fcntl

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: 'no'
use_cpu: true
main_process_port: 29517
"""
