"""Forked jobs: they run as a new interpreter would, and where they would not, a new interpreter runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from btx.engines import processes
from btx.engines.local import Ended, Job, Local
from btx.events import Event, Note

IMPORTS = ("btx.events", "colorsys")  # colorsys: which nothing else imports
SAY = "import os, signal, sys, time\nfrom btx.events import Failed, Note\ndef say(event): print(event.line())\n"


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> processes.Server:
    """A server that has not been asked yet, in an environment that is the same in every test."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setattr(processes, "SERVER", processes.Server())
    return processes.SERVER


def ran(folder: Path, code: str, *, fork: bool, to: str = "job") -> tuple[Ended, list[str], str]:
    """How a module's job ended, what it noted, and its log."""
    (folder / f"{to}.py").write_text(SAY + code)
    events: list[Event] = []
    job = Job(to, [sys.executable, "-m", to, "a", "b"], folder / f"{to}.log", imports=IMPORTS if fork else ())
    ended = Local(1).run([job], events.append)[to]
    return ended, [event.text for event in events if isinstance(event, Note)][1:], job.log.read_text()


@pytest.mark.parametrize("code", [
    "", "sys.exit(4)", "sys.exit('a sentence')", "say(Failed('job', 'no luck', 3)); sys.exit(3)", "1 / 0",
    "os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)", "os._exit(7)",
    "print('to the log', file=sys.stderr)", "os.write(2, b'raw\\n')", "say(Note('job', ' '.join(sys.argv[1:])))",
    "say(Note('job', repr(sys.stdin.read())))", "say(Note('job', __name__ + os.getcwd()))",
    "say(Note('job', str(os.getsid(0) == os.getpgid(0) == os.getpid())))", "say(Note('job', '\\N{SNOWMAN}'))",
    "say(Note('job', str(sorted(os.environ.items()))))", "say(Note('job', str(signal.getsignal(signal.SIGINT))))",
])  # fmt: skip
def test_a_fork_ends_and_says_what_a_new_interpreter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # which a fork is told
    monkeypatch.chdir(tmp_path)  # which a new interpreter has on its path
    forked, spawned = (ran(tmp_path, code, fork=fork) for fork in (True, False))
    assert (forked[0].code, forked[0].error, forked[1]) == (spawned[0].code, spawned[0].error, spawned[1])
    assert forked[2].splitlines()[-1:] == spawned[2].splitlines()[-1:]


def test_a_fork_has_the_imports_ready_and_a_new_interpreter_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = "say(Note('job', str('colorsys' in sys.modules)))"
    assert ran(tmp_path, code, fork=True)[1] == ["True"]
    assert ran(tmp_path, code, fork=False)[1] == ["False"]


def test_another_environment_gets_a_new_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries read the environment while they are imported, so that a fork would not heed a change."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = "say(Note('job', str('colorsys' in sys.modules) + os.environ.get('BTX_TEST', '')))"
    assert ran(tmp_path, code, fork=True)[1] == ["True"]
    monkeypatch.setenv("BTX_TEST", "!")
    assert ran(tmp_path, code, fork=True)[1] == ["False!"]


def test_a_server_that_cannot_start_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: processes.Server
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", _refuse)
    assert ran(tmp_path, "say(Note('job', 'here'))", fork=True)[1] == ["here"]
    assert server.failed


def _refuse(_self: object) -> None:
    raise EOFError


@pytest.mark.parametrize("killed", [False, True])
def test_a_fork_ends_with_the_run_that_started_it(tmp_path: Path, killed: bool) -> None:
    """Also when the run is killed: the server sees that its pipe has closed, and ends before it tidies anything up."""
    (tmp_path / "tidies.py").write_text("import atexit, pathlib\natexit.register(pathlib.Path('tidied').touch)\n")
    (tmp_path / "job.py").write_text(
        "import os, time\nfrom btx.graph.launch import die_with_parent\ndie_with_parent()\n"
        "open('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    (tmp_path / "run.py").write_text(
        "import sys, threading, time, os, pathlib\nfrom btx.engines.local import Job, Local\n"
        f"if __name__ == '__main__':\n    job = Job('job', [sys.executable, '-m', 'job'], pathlib.Path('log'), "
        f"imports={(*IMPORTS, 'tidies')})\n    Local(1).run([job], lambda event: None)\n"
    )
    run = subprocess.Popen([sys.executable, "-m", "run"], cwd=tmp_path)
    pid = _number(tmp_path / "pid")
    run.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
    run.wait(timeout=30)
    _gone(pid)
    assert not (tmp_path / "tidied").exists()


def _number(file: Path) -> int:
    return int(_until(lambda: file.exists() and file.read_text()))


def _gone(pid: int) -> None:
    _until(lambda: not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def _until(condition: Callable[[], object]) -> str:
    for _ in range(600):
        if found := condition():
            return str(found)
        time.sleep(0.05)
    raise AssertionError("not within 30 s")


def test_a_script_of_a_users_is_never_run_again(tmp_path: Path) -> None:
    """The fork server imports the main module, which for a script without a guard would run it once more."""
    (tmp_path / "job.py").write_text("")
    (tmp_path / "mine.py").write_text(
        "import sys, pathlib\nprint('mine')\nfrom btx.engines.local import Job, Local\n"
        f"job = Job('job', [sys.executable, '-m', 'job'], pathlib.Path('log'), imports={IMPORTS})\n"
        "print(Local(1).run([job], lambda event: None)['job'].code)\n"
    )
    said = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout == "mine\n0\n"
