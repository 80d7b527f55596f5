"""A signal ends the process with the exit code for an interruption, wherever it arrives."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from btx.signals import WATCHED, heeded

STOPPED = """
import os, click
from btx.cli.command import Command

@click.group(cls=Command)
def main(): pass

@main.command()
@click.argument("number", type=int)
def inside_an_exec(number):
    exec("import os, time\\nos.kill(os.getpid(), number)\\ntime.sleep(10)", {"number": number})

main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_that_meets_an_exec_of_source_ends_with_75_too(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    command = [sys.executable, "-m", "stopped", "inside-an-exec", str(int(number))]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    assert ended.returncode == 75, ended.stderr
    assert "interrupted" in ended.stderr


def test_a_hang_up_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert heeded(WATCHED) == [n for n in WATCHED if n != signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert heeded(WATCHED) == list(WATCHED)
    finally:
        signal.signal(signal.SIGHUP, before)
