"""Runs untrusted Python in a bounded process: no network, no files but Python's own, no processes but its own.

The process has user, mount, pid, network, ipc, uts and cgroup namespaces of its own, which `btx/tasks/jail.py` builds,
an empty environment and standard input, no capabilities, and limits on time, memory, processes, files and output.
Before the first program of a process, canaries (`btx/tasks/canaries.py`) attack it; if one gets through, or the system
gives no namespaces, nothing is run.

A program passes if all its parts run to their end; then, and only then, its interpreter writes a random token, which
is not in its source, to a pipe. Printing, exiting early, `atexit` and patched builtins do not write it. What remains:
tests run in the interpreter of what they test, so a program may return objects that equal everything, jump over a test
by `sys.settrace`, or search the interpreter's frames for the token. And the kernel is the host's: no seccomp filter
narrows the system calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from btx.tasks.canaries import require
from btx.tasks.enclosed import Limits, Ran, run_enclosed


def run(parts: Sequence[str], limits: Limits | None = None) -> Ran:
    """Run the parts of a program, one after another, in one namespace; NotEnclosedError where there is no sandbox."""
    require()
    return run_enclosed(parts, limits or Limits())
