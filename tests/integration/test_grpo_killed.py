"""GRPO that is killed, at any step, ends with the bytes of a run that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from btx.errors import InterruptedRunError
from btx.graph.artifact import STATES
from btx.rl.policy import Policy
from tests.support.policies import step_of, trained, world_of

FILES = ("model.safetensors", "config.json", "policy.json", "policy.parquet")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("whole"), **LONG).folder


LONG = {"steps": 5, "kl": 0.1, "probe_every": 2, "mark_every": 3, "mark_samples": 2,
        "bands": ["hard", "medium", "easy"]}  # fmt: skip


@pytest.mark.parametrize(("every", "dies"), [(1, 1), (1, 4), (2, 3), (3, 3), (9, 2)])
def test_killed_at_any_step_it_ends_with_the_same_bytes(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, every: int, dies: int
) -> None:
    """With `every` above the steps there is no state, so it starts over, and ends alike."""
    world = world_of(tmp_path, **LONG)
    world.set("run.checkpoint_steps", every)
    step = step_of(world)
    real = Policy.rollout

    def dying(self: Policy, model: Any, slots: Any, at: int) -> Any:
        if at == dies:
            raise RuntimeError("killed")
        return real(self, model, slots, at)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "rollout", dying)
        with pytest.raises(RuntimeError, match="killed"):
            step.build(lambda _event: None)
    assert not step.exists
    step.build(lambda _event: None)
    facts = json.loads((step.folder / "btx.json").read_text())["facts"]
    assert facts["resumed_from"] == dies // every * every
    for name in (*FILES, "marks.parquet"):
        assert (step.folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert len((step.folder / "logs" / "policy.jsonl").read_text().splitlines()) == 5
    assert not (step.work / STATES).exists()


def test_a_signal_saves_and_a_damaged_state_is_not_resumed_from(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(world_of(tmp_path, **LONG))
    real = Policy.rollout

    def signalled(self: Policy, model: Any, slots: Any, at: int) -> Any:
        if at == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, model, slots, at)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "rollout", signalled)
        with pytest.raises(InterruptedRunError, match="step 3 is saved"):
            step.build(lambda _event: None)
    state = step.work / STATES / "step-000000003"
    (state / "model.safetensors").write_bytes((state / "model.safetensors").read_bytes()[:-1] + b"x")
    step.build(lambda _event: None)
    assert json.loads((step.folder / "btx.json").read_text())["facts"]["resumed_from"] == 0
    assert (step.folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
