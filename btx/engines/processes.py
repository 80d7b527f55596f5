"""Starts a process for a command line: a new interpreter, or a fork of one that has already imported what it needs.

Importing torch and a model class takes seconds; a fork of a process that has done it once starts in milliseconds. The
standard library's fork server is that process: it never computes, so it holds no device, and a fork lacks no threads
but idle ones of libraries, which start them anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Protocol, TextIO

MODULE = "-m"  # a command line that a fork can carry out: [sys.executable, "-m", module, ...]


class Process(Protocol):
    """A started process: its id is that of its session and group too; its standard output is read here."""

    pid: int

    @property
    def stdout(self) -> IO[bytes] | None:
        """The reading end of its standard output."""

    def send_signal(self, number: int, /) -> None:
        """Send it a signal, unless it has ended."""

    def closed(self) -> None:
        """Block until it has ended, from any thread."""

    def wait(self) -> int:
        """Its exit code (negative: the signal that killed it), once it has ended; from the thread that started it."""


class Spawned(subprocess.Popen[bytes]):
    """A new interpreter."""

    def closed(self) -> None:
        """Block until it has ended."""
        self.wait()


class Forked:
    """A fork of the fork server."""

    def __init__(self, process: Any, stdout: IO[bytes]) -> None:
        self.process, self.stdout, self.pid = process, stdout, process.pid

    def send_signal(self, number: int, /) -> None:
        """Send it a signal, unless it has ended."""
        if not wait([self.process.sentinel], timeout=0):
            os.kill(self.pid, number)

    def closed(self) -> None:
        """Block until it has ended; its exit code stays to be read by `wait`, as one thread alone may."""
        wait([self.process.sentinel])

    def wait(self) -> int:
        """Its exit code."""
        self.process.join()
        return int(self.process.exitcode)


def start(argv: Sequence[str], log: Path, env: Mapping[str, str], *, imports: Sequence[str] = ()) -> Process:
    """Start a command line in a session of its own, its standard error appended to `log`.

    With `imports`, a command line of a module is a fork of a process that has imported them where that is possible.
    """
    if imports and list(argv[:2]) == [sys.executable, MODULE] and (found := SERVER.fork(argv[2:], log, env, imports)):
        return found
    with log.open("ab") as file:
        return Spawned(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, env=dict(env), start_new_session=True
        )


@dataclass
class Server:
    """The fork server of this process; the first fork starts it, and it ends with us.

    It serves one environment, the first that is asked for: libraries read theirs while they are imported.
    """

    serves: tuple[dict[str, str], tuple[str, ...]] | None = None
    failed: bool = False

    def fork(self, module: Sequence[str], log: Path, env: Mapping[str, str], imports: Sequence[str]) -> Forked | None:
        """A fork that runs `python -m MODULE ...`; None where it would differ from a new interpreter."""
        asked = (dict(env), tuple(imports))
        if self.serves is None:
            self.serves = asked
            multiprocessing.set_forkserver_preload([*imports, "btx.engines.ends_at_once"])
        if self.failed or self.serves != asked or not _repeatable():
            return None
        context = multiprocessing.get_context("forkserver")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_carry_out, args=(list(module), there, str(log), os.getcwd(), dict(env)))
        with here, there:
            try:
                process.start()
            except (OSError, EOFError):  # no place for its socket, or it was killed while it imported
                self.failed = True
                return None
            return Forked(process, os.fdopen(os.dup(here.fileno()), "rb"))


SERVER = Server()


def _repeatable() -> bool:
    """Whether a fork may import our main module, as the fork server makes it do: not if it is a script of a user's."""
    main = sys.modules["__main__"]
    return main.__spec__ is not None or Path(getattr(main, "__file__", None) or "btx").name == "btx"


def _carry_out(module: list[str], output: Connection, log: str, folder: str, env: dict[str, str]) -> None:
    """Run `python -m MODULE ...` in this fork, as a new interpreter would."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server's was to ignore it
    with open(os.devnull, "rb") as nothing, open(log, "ab") as file:
        for there, here in ((nothing.fileno(), 0), (output.fileno(), 1), (file.fileno(), 2)):
            os.dup2(there, here)
    output.close()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # with the end of a pipe by which the server sees that its user lives
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (_text(number, was) for number, was in ((1, sys.stdout), (2, sys.stderr)))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = module
    runpy.run_module(module[0], run_name="__main__", alter_sys=True)


def _text(number: int, like: TextIO) -> TextIO:
    """A descriptor as text, like the server's stream, which may have been opened on a file or a terminal."""
    return open(number, "w", buffering=1, encoding=like.encoding, errors=like.errors, closefd=False)
