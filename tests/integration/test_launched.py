"""Trainings of several processes, started by accelerate: stopped, killed and resumed. Slow."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.graph import artifact
from tests.support.command import BTX, FSDP, btx, wait_for_step, wait_until_free
from tests.support.project import write_project

LAUNCHES = {"ddp": FSDP.replace("distributed_type: FSDP", "distributed_type: MULTI_GPU"), "fsdp": FSDP}


def manifest(folder: Path) -> Any:
    """The manifest of the only training below a run directory."""
    return json.loads((folder / "pico/train-math/btx.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("ddp", signal.SIGKILL), ("fsdp", signal.SIGTERM)])
def test_two_processes_save_together_stop_together_and_resume_to_the_same_digest(
    tmp_path: Path, kind: str, number: signal.Signals
) -> None:
    write_project(tmp_path)
    (tmp_path / "two.yaml").write_text(LAUNCHES[kind])
    sets = ["run.launch=two.yaml", "run.checkpoint_minutes=0.002", "domains.math.tokens=128000"]
    argv = ["train", "recipe.yaml", "--domain", "math", *(p for s in sets for p in ("--set", s))]
    btx(*argv, "--set", "run.directory=whole", cwd=tmp_path)
    argv += ["--set", "run.directory=stopped"]
    runner = subprocess.Popen([*BTX, *argv], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "stopped/pico", 50)
    runner.send_signal(number)
    assert runner.wait(timeout=120) == (-9 if number == signal.SIGKILL else 75)
    wait_until_free(next((tmp_path / "stopped/pico/work").glob("train-*.lock")))
    btx(*argv, cwd=tmp_path)
    whole, stopped = manifest(tmp_path / "whole"), manifest(tmp_path / "stopped")
    assert whole["facts"]["processes"] == stopped["facts"]["processes"] == 2
    least = 1 if number == signal.SIGKILL else 50  # the last timed save may lie some steps before the kill
    assert least <= stopped["facts"]["resumed_from"] < 490
    assert stopped["digest"] == whole["digest"]


def test_a_further_process_helps_only_the_first_one_of_its_own_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another launch holds the lock it waits, then finds the step done: its own rank 0 will never start it."""
    step = Graph(load_recipe(write_project(tmp_path), [f"run.directory={tmp_path / 'runs'}"]), tmp_path).steps["branch"]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    calls: list[str] = []

    def sleep(_seconds: float) -> None:
        calls.append("waits")
        monkeypatch.setattr(type(step), "done", len(calls) > 1)

    monkeypatch.setattr("btx.graph.step.time.sleep", sleep)
    monkeypatch.setattr(type(step), "run", lambda *_: calls.append("helps"))
    with artifact.lock(step.lock_file, waiting=calls.append):
        step.build(lambda _event: None, rank=1)
        assert calls == ["helps"]
        monkeypatch.setenv("MASTER_PORT", "2")
        step.build(lambda _event: None, rank=1)
    assert calls == ["helps", "waits"]


def test_a_further_process_whose_first_one_finds_the_step_done_does_not_start_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may finish between its check of the step and its check of the lock."""
    step = Graph(load_recipe(write_project(tmp_path), [f"run.directory={tmp_path / 'runs'}"]), tmp_path).steps["branch"]
    monkeypatch.setattr(type(step), "done", False)

    def held(_path: Path) -> bool:
        monkeypatch.setattr(type(step), "done", True)  # others have published, and the first one has the lock now
        return True

    monkeypatch.setattr("btx.graph.step.held_by_launch", held)
    monkeypatch.setattr(type(step), "run", lambda *_: pytest.fail("it runs alone"))
    step.build(lambda _event: None, rank=1)
