"""What reinforcement does to formats and confidences, on policies of three random seeds, with wide margins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from btx.cli.main import graph_of
from btx.conversions.grpo import Grpo
from tests.support.policies import FORMATS, world_of

LONG = {"steps": 60, "prompts": 8, "generations": 8, "probe_samples": 64}
SEEDS = range(3)


def numbers(root: Path, seed: int, **more: Any) -> tuple[dict[str, float], dict[str, float]]:
    """What is seen of the held-out items before the first step and after the last."""
    torch.set_num_threads(1)
    root.mkdir(parents=True)
    graph = graph_of(world_of(root, seed=seed, **LONG, **more).write(), ())
    for step in graph.needed(["grpo"]):
        step.build(lambda _event: None)
    step = graph.steps["grpo"]
    assert isinstance(step, Grpo)
    found = step.numbers()
    return found["0"], found["60"]


@pytest.mark.slow
def test_formats_collapse_into_what_is_right_and_a_kl_term_ends_at_the_closed_form(tmp_path: Path) -> None:
    """Shares ∝ α (p e^(1/β) + 1 − p), from α and p as they are seen before the first step."""
    for seed in SEEDS:
        first, last = numbers(tmp_path / f"{seed}-free", seed)
        assert last["accuracy"] > first["accuracy"] + 0.25
        assert last["share_equals"] > first["share_equals"] + 0.2
        assert last["share_arrow"] < 0.12
        assert last["entropy"] < first["entropy"] - 0.1
        first, last = numbers(tmp_path / f"{seed}-held", seed, kl=1.0)
        for name in FORMATS:
            assert abs(last[f"share_{name}"] - first[f"optimum_{name}"]) < 0.05
        assert abs(first["share_equals"] - first["optimum_equals"]) > 0.06  # so that to stay would not do
        assert last["share_equals"] > first["share_equals"] + 0.04
        assert last["entropy"] > first["entropy"] - 0.08


@pytest.mark.slow
def test_the_calibrated_reward_teaches_what_is_known_and_the_binary_one_does_not(tmp_path: Path) -> None:
    for seed in SEEDS:
        (_, binary), (_, calibrated) = (
            numbers(tmp_path / f"{seed}-{reward}", seed, reward=reward) for reward in ("binary", "calibrated")
        )
        assert abs(binary["accuracy"] - calibrated["accuracy"]) < 0.1
        assert min(binary["stated"], calibrated["stated"]) > 0.8
        assert calibrated["stated_ece"] < 0.18 < 0.22 < binary["stated_ece"]
        assert calibrated["stated_brier"] < binary["stated_brier"] - 0.1
