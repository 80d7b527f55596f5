"""Starts the process that holds an untrusted program, feeds it, watches it, and ends it.

What it is held in, and what remains open, is said in `btx/tasks/sandbox.py`, which checks it first.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from btx.errors import ResourceError

JAIL = Path(__file__).with_name("jail.py")
VISIBLE = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache", os.devnull)
GRACE = 30.0  # seconds for the sandbox to be built, before the program's own begin
REMEDY = (
    "It needs Linux 5.12 or newer with user namespaces: see the sysctls user.max_user_namespaces and "
    "kernel.apparmor_restrict_unprivileged_userns; in a container, a seccomp profile that allows unshare and mount. "
    "Or leave tasks of kind `code` out"
)

# What runs inside. References are taken, and all parts compiled, before any part runs and may patch builtins.
INSIDE = """
def main():
    import json, os, sys, traceback
    write, leave, tell, execute = os.write, os._exit, traceback.print_exc, exec
    job, verdict = map(int, sys.argv[1:])
    with open(job, encoding="utf-8") as file:
        said = json.load(file)
    token, parts = said["token"].encode(), said["parts"]
    sys.argv[:] = ["program"]
    del sys.orig_argv[:]
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        for code in [compile(part, f"part {n}", "exec", optimize=0) for n, part in enumerate(parts)]:
            execute(code, space)
    except BaseException:
        tell()
        leave(1)
    write(verdict, token)
    leave(0)
main()
"""


class NotEnclosedError(ResourceError):
    """The system does not give a sandbox, so no program was run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use: wall-clock and CPU seconds, bytes of address space per process, processes, output."""

    seconds: float = 10.0
    memory: int = 512 * 2**20
    processes: int = 16
    output: int = 64 * 2**10  # bytes; a program that writes more is ended

    def rlimits(self) -> dict[str, int]:
        """By the names of setrlimit(2)."""
        return {
            "CPU": int(self.seconds) + 1, "AS": self.memory, "NPROC": self.processes, "FSIZE": 16 * 2**20,
            "NOFILE": 64, "CORE": 0, "MEMLOCK": 0,
        }  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """The end of a program: `how` is passed, failed, timed out, or too much output; `said` is its bounded output."""

    how: str
    said: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all parts ran to their end."""
        return self.how == "passed"


def view() -> tuple[list[str], list[str]]:
    """Paths that a program sees, read-only, and folders among them that are covered by empty ones (packages)."""
    executable = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    prefixes = [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    named = [*prefixes, os.path.dirname(os.__file__), sysconfig.get_config_var("DESTSHARED")]  # not those of a venv
    own = {os.path.realpath(path) for path in named if path and os.path.isdir(path)}
    binds = [path for path in (*VISIBLE, *own, executable) if os.path.exists(path)]
    folders = {os.path.realpath(path) for path in binds if os.path.isdir(path)}
    covers = {
        os.path.realpath(found)
        for folder in folders for below in ("*-packages", "python*/*-packages")
        for found in glob.glob(os.path.join(glob.escape(folder), below))
    }  # fmt: skip
    return sorted(binds, key=len), sorted(covers)


def run_enclosed(parts: Sequence[str], limits: Limits) -> Ran:
    """Run the parts of a program, one after another, in one namespace; NotEnclosedError if it cannot be held."""
    if sys.platform != "linux":
        raise NotEnclosedError(f"programs of tasks are not run on {sys.platform}, which has no namespaces. {REMEDY}.")
    binds, covers = view()
    executable = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    token = secrets.token_hex(32)
    (job_r, job_w), (verdict_r, verdict_w), (status_r, status_w) = os.pipe(), os.pipe(), os.pipe()
    command = [executable, "-s", "-S", "-P", "-B", "-u", "-X", "utf8", "-c", INSIDE, str(job_r), str(verdict_w)]
    config = {
        "binds": binds, "covers": covers, "limits": limits.rlimits(), "fds": [job_r, verdict_w], "status": status_w,
        "parent": os.getpid(), "command": command, "environment": {"PYTHONHASHSEED": "0"},
    }  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(
        [executable, "-I", "-S", str(JAIL), json.dumps(config)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, pass_fds=(job_r, verdict_w, status_w), env={}, start_new_session=True,
    )  # fmt: skip
    for fd in (job_r, verdict_w, status_w):
        os.close(fd)
    assert process.stdout
    job = json.dumps({"token": token, "parts": list(parts)}).encode()
    watched = _Watch({"said": process.stdout.fileno(), "verdict": verdict_r, "status": status_r}, job_w, job)
    try:
        ended = watched.until(limits.seconds, limits.output)
    finally:
        _end(process)
        watched.close()
    read = {name: bytes(found) for name, found in watched.found.items()}
    if problem := read["status"].decode(errors="replace"):
        raise NotEnclosedError(
            f"programs of tasks are not run, since this system gives no sandbox: {problem}. {REMEDY}."
        )
    if ended and watched.building:
        raise NotEnclosedError(
            f"programs of tasks are not run, since a sandbox was not ready within {GRACE:.0f} s. Free the machine."
        )
    passed = ended == "" and process.returncode == 0 and read["verdict"] == token.encode()
    said = read["said"][: limits.output].decode(errors="replace")
    return Ran(ended or ("passed" if passed else "failed"), said, time.monotonic() - started)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the jail's session; its process 1 is in it, and takes all that the program started with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout
    process.stdout.close()


class _Watch:
    """Reads pipes at once, and writes one, until all are closed or a limit is met."""

    def __init__(self, read: dict[str, int], write: int, data: bytes) -> None:
        self.read, self.write, self.rest = read, write, memoryview(data)
        self.found = {name: bytearray() for name in read}
        self.building = True
        self.selector = selectors.DefaultSelector()
        for name, fd in read.items():
            os.set_blocking(fd, False)
            self.selector.register(fd, selectors.EVENT_READ, name)
        os.set_blocking(write, False)
        self.selector.register(write, selectors.EVENT_WRITE, "")

    def until(self, seconds: float, most: int) -> str:
        """Why it stopped before the process's end: timed out, or too much output; empty at the end.

        The seconds count from when `status` closes, as it does when the program starts.
        """
        began = time.monotonic()
        while self.selector.get_map():
            if self.building and self.read["status"] not in self.selector.get_map():
                began, self.building = time.monotonic(), False
            left = began + (GRACE if self.building else seconds) - time.monotonic()
            if left <= 0:
                return "timed out"
            for key, _ in self.selector.select(left):
                self._move(key.fd, key.data)
            if len(self.found["said"]) > most or len(self.found["verdict"]) > 4096:
                return "too much output"
        return ""

    def _move(self, fd: int, name: str) -> None:
        """Read what there is, or write what fits."""
        try:
            if name:
                data = os.read(fd, 65536)
                self.found[name] += data
                closed = not data
            else:
                self.rest = self.rest[os.write(fd, self.rest) :]
                closed = not self.rest
        except BrokenPipeError:
            closed = True
        if closed:
            self.selector.unregister(fd)
            if not name:
                self._close_write()

    def _close_write(self) -> None:
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    def close(self) -> None:
        """Close the pipes, but standard output, which its process owns."""
        self.selector.close()
        self._close_write()
        for name, fd in self.read.items():
            if name != "said":
                os.close(fd)
