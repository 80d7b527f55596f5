"""The sandbox: honest programs pass, and attacks do not. Skipped where the system gives no namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from btx.recipe.task_settings import TaskSettings
from btx.tasks import canaries
from btx.tasks.answers import judge_for
from btx.tasks.enclosed import Limits
from btx.tasks.items import read_items
from btx.tasks.sandbox import run
from tests.support.sandbox import held

SHARED = Path(__file__).resolve().parents[3] / "shared/data/tasks/mbpp_prompt_and_validation.jsonl"


TEST = "assert add(2, 3) == 5"
WRITES = """
import os
def write(data):
    for n in range(64):
        try:
            os.write(n, data)
        except OSError:
            pass
    os._exit(0)
"""  # to every descriptor


@held
@pytest.mark.parametrize("parts", [
    ["", "def add(a, b):\r\n    return a + b", TEST],
    ["one = 1", "from functools import reduce\ndef add(*a): return reduce(lambda x, y: x + y, a)", TEST],
    ["", "import heapq, collections, re, math, itertools, ctypes, zlib, random, datetime, decimal", "assert True"],
    ["", "import tempfile, os\nwith open('mine', 'w') as f: f.write('x')", "assert open('mine').read() == 'x'"],
    ["", "import sys\nsys.stdout = None", "assert True"],
    ["", "import os\nopen(os.devnull, 'w').write('x')", "assert 1"],
])  # fmt: skip
def test_a_right_program_passes(parts: list[str]) -> None:
    assert run(parts).how == "passed"


@held
@pytest.mark.parametrize("code", [
    "def add(a, b): return a - b",
    "def add(a, b) return a + b",
    "",
    "import os\nos._exit(0)",
    "import sys\nsys.exit(0)",
    "raise SystemExit",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "import os\nif os.fork(): os._exit(0)",
    "import os\nos.execv('/bin/true', ['true'])",
    "import atexit, os\natexit.register(os._exit, 0)",
    "import threading, os\nthreading.Timer(0, os._exit, [0]).start()\nimport time; time.sleep(5)",
    "print('passed'); print(chr(10) * 3)",
    f"{WRITES}write(b'x' * 64)",
    f"{WRITES}write(b'')",
    f"import sys\n{WRITES}write(' '.join([*sys.argv, *sys.orig_argv, repr(dict(os.environ))])[-64:].encode())",
    "import builtins\nbuiltins.AssertionError = builtins.ZeroDivisionError = type('X', (BaseException,), {})",
    "import builtins\nbuiltins.compile = builtins.exec = lambda *a, **k: None",
    "import traceback\ntraceback.print_exc = lambda *a: None",
    "import os\nos.write = os._exit = lambda *a: None",
    "x = '''",
    "if False:",
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "import gc, resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
], ids=range(23))  # fmt: skip
def test_a_wrong_program_does_not(code: str) -> None:
    assert not run(["", code, TEST], Limits(seconds=5)).passed


@held
@pytest.mark.parametrize("code", [
    "class Any(int):\n    __eq__ = lambda *_: True\ndef add(a, b): return Any()",
    "import os, sys\nheld = sys._getframe(1).f_locals\nos.write(held['verdict'], held['token'])\nos._exit(0)",
], ids=["equals everything", "reads frames"])  # fmt: skip
def test_what_remains_is_what_the_module_says(code: str) -> None:
    """Known, and written down in `btx/tasks/sandbox.py`: whoever closes one of these changes that text too."""
    assert run(["", code, TEST]).passed


@held
def test_the_tests_are_run_after_what_they_test() -> None:
    seen = run(["order = ['setup']", "order.append('code')", "print(order); assert order == ['setup', 'code']"])
    assert seen.passed
    assert seen.said == "['setup', 'code']\n"
    assert "ZeroDivisionError" in run(["1 / 0"]).said


@held
@pytest.mark.skipif(not SHARED.is_file(), reason="the shared task files are not beside the project")
def test_the_solutions_of_mbpp_pass_their_own_tests_and_no_others() -> None:
    settings = TaskSettings.model_validate({"file": "x", "kind": "code", "limit": 40})
    items = read_items(settings, str(SHARED), None)
    with SHARED.open(encoding="utf-8") as lines:
        codes = [json.loads(line)["code"] for line in lines][: len(items)]
    judge = judge_for(settings)
    assert all(judge(item, code).right for item, code in zip(items, codes, strict=True))
    assert not any(judge(item, code).right for item, code in zip(items[:5], codes[1:6], strict=True))


@held
@pytest.mark.parametrize("code", ["while True: pass", "import time\ntime.sleep(99)", canaries.LINGERS])
def test_time_is_up_for_all_processes(code: str) -> None:
    began = time.monotonic()
    assert run([code], Limits(seconds=0.5)).how == "timed out"
    assert time.monotonic() - began < 5
    for _ in range(100):  # a busy machine takes a moment to end what was killed
        if not _processes(os.getpid()):
            return
        time.sleep(0.05)
    raise AssertionError("a process outlives its time")


@held
def test_a_program_ends_with_the_process_that_runs_it() -> None:
    code = "from btx.tasks.enclosed import *; run_enclosed(['import time; time.sleep(60)'], Limits(seconds=60))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) as runner:
        for _ in range(200):
            if len(_processes(runner.pid)) > 1:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the sandbox did not start")
        runner.kill()
    for _ in range(100):
        if not _processes(runner.pid):
            return
        time.sleep(0.05)
    raise AssertionError("the sandbox outlives who runs it")


def _processes(parent: int) -> list[str]:
    """Command lines of all jails of a process, which hold its id."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(file.read_text(encoding="utf-8", errors="replace"))
    return [line for line in found if f'"parent": {parent}' in line]


@held
def test_output_is_bounded() -> None:
    found = run(["import os\nwhile True: os.write(1, b'x' * 4096)"], Limits(output=10_000))
    assert found.how == "too much output"
    assert len(found.said) == 10_000


@held
def test_no_descriptor_and_no_variable_is_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTX_SECRET", "canary")
    with (tmp_path / "secret").open("w+b") as file:
        os.set_inheritable(file.fileno(), True)
        code = f"""
import os
opened = []
for n in range(3, 1024):
    try:
        opened.append(n * bool(os.fstat(n)))
    except OSError:
        pass
assert len(opened) == 1, opened  # the pipe of the verdict
assert "BTX_SECRET" not in os.environ
assert not os.path.exists({str(tmp_path)!r}) and not os.path.exists({str(Path(__file__).parent)!r})
"""
        assert run([code]).passed, run([code]).said


@held
@pytest.mark.parametrize("what", ["mount", "umount", "namespace", "trace", "device", "remount"])
def test_what_the_kernel_must_refuse(what: str) -> None:
    """Each attack fails with an error; the program passes if it does."""
    attacks = {
        "mount": "call(libc.mount, b'none', b'/tmp', b'tmpfs', 0, b'')",
        "umount": "call(libc.umount2, b'/tmp', 2)",
        # In a user namespace of its own it may mount again, but neither undo nor write what was mounted read-only.
        "namespace": "libc.unshare(0x10020000); call(libc.umount2, os.__file__.rpartition('/')[0].encode(), 2)",
        "remount": "libc.unshare(0x10020000); call(libc.mount, b'none', b'/', b'', 4096 | 32, b'')",
        "trace": "call(libc.ptrace, 16, 1, 0, 0)",  # PTRACE_ATTACH to process 1
        "device": "call(libc.mknod, b'/tmp/mem', 0o20666, 0x101)",
    }
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *args):
    assert function(*args) < 0, "it was allowed"
{attacks[what]}
"""
    assert run([code]).passed, run([code]).said


@held
def test_a_program_gives_the_same_result_each_time() -> None:
    said = {run(["print(list({str(n) for n in range(50)}), hash('x'))"]).said for _ in range(3)}
    assert len(said) == 1
