"""Without a sandbox that holds nothing is run: canaries find what is left out of it, and refusals say what and why.

Only tests that weaken a sandbox skip where the system gives none.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btx.tasks import canaries, enclosed
from btx.tasks.enclosed import Limits, NotEnclosedError, run_enclosed
from btx.tasks.sandbox import run
from tests.support.sandbox import held


@pytest.fixture
def unproven() -> Iterator[None]:
    """The canaries as if they had not run yet, and again afterwards."""
    canaries.require.cache_clear()
    yield
    canaries.require.cache_clear()


def weakened(monkeypatch: pytest.MonkeyPatch, folder: Path, old: str, new: str) -> None:
    """The jail with a piece of its source replaced."""
    source = enclosed.JAIL.read_text(encoding="utf-8")
    assert old in source
    (folder / "jail.py").write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(enclosed, "JAIL", folder / "jail.py")


@held
@pytest.mark.parametrize(("old", "new", "caught"), [
    ('"network": 0x40000000, ', "", "can reach a listener"),
    ('"pid": 0x20000000, ', "", "can see or signal a process"),
    ("    give_up_rights(config, second)\n", "", "it has capabilities"),
    ('config["environment"]', '{**config["environment"], "SECRET": "1"}', "can write outside"),
    ('in config["binds"]:', 'in [*config["binds"], "/etc/passwd"]:', "can read a file"),
], ids=range(5))  # fmt: skip
def test_canaries_find_a_hole_in_the_jail(
    old: str, new: str, caught: str, tmp_path: Path, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weakened(monkeypatch, tmp_path, old, new)
    with pytest.raises(NotEnclosedError, match=caught):
        run(["pass"])


@held
@pytest.mark.parametrize(("limit", "caught"), [("NPROC", "any number of processes"), ("AS", "take any memory")])
def test_canaries_find_a_limit_that_is_missing(
    limit: str, caught: str, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = Limits.rlimits
    monkeypatch.setattr(Limits, "rlimits", lambda self: {k: v for k, v in every(self).items() if k != limit})
    with pytest.raises(NotEnclosedError, match=caught):
        run(["pass"])


@held
@pytest.mark.parametrize("ends", ["timed out", "too much output"])
def test_canaries_that_must_be_ended_find_one_that_ends_itself(
    ends: str, tmp_path: Path, unproven: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = [one for one in canaries.canaries(tmp_path / "x", 1, b"\0x") if one.ends == ends]
    assert meant
    idle = [canaries.Canary(one.what, "pass", one.ends, one.limits) for one in meant]
    monkeypatch.setattr(canaries, "canaries", lambda *_args: idle)
    with pytest.raises(NotEnclosedError, match=meant[0].what):
        run(["pass"])


def test_without_namespaces_nothing_is_run(unproven: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where unshare is refused, the sentence says what, where and the remedy."""
    weakened(monkeypatch, tmp_path, "libc.unshare, sum(", "libc.chroot, b'/nowhere' * bool(")
    marker = tmp_path / "ran"
    with pytest.raises(NotEnclosedError, match=r"unshare user.*user namespaces.*tasks of kind `code`") as told:
        run([f"open({str(marker)!r}, 'w')"])
    assert told.value.exit_code == 5
    assert str(told.value).endswith(".")
    assert not marker.exists()


def test_where_the_kernel_gives_no_namespace_the_refusal_is_the_same(tmp_path: Path) -> None:
    """In a user namespace whose root has forbidden further ones."""
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    enter = ["unshare", "-Ur", "sh", "-c", forbid, "sh"]
    if not shutil.which("unshare") or subprocess.run([*enter, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system has no unshare(1), or does not let it make a user namespace")
    marker = tmp_path / "ran"
    code = f"from btx.tasks.sandbox import run\nrun([\"open({str(marker)!r}, 'w')\"])"
    done = subprocess.run([*enter, sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 1
    assert "NotEnclosedError: programs of tasks are not run" in done.stderr
    assert "unshare user" in done.stderr
    assert not marker.exists()


def test_another_system_is_refused(unproven: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enclosed.sys, "platform", "darwin")
    with pytest.raises(NotEnclosedError, match="darwin"):
        run(["pass"])


@pytest.mark.parametrize("step", ["binds", "covers", "limits"])
def test_a_jail_that_cannot_be_built_runs_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before the program starts is the sandbox's, never the program's."""
    if step == "limits":
        monkeypatch.setattr(Limits, "rlimits", lambda _self: {"NO_SUCH_LIMIT": 1})
    else:
        paths: tuple[Any, Any] = (["/no/such/folder"], []) if step == "binds" else ([], ["/no/such/folder"])
        monkeypatch.setattr(enclosed, "view", lambda: paths)
    with pytest.raises(NotEnclosedError, match="gives no sandbox"):
        run_enclosed(["pass"], Limits())
