"""A sample of the table of settings, run: what is of no class leaves every byte, the environment all but rounding."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from safetensors.torch import load_file

from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.graph.artifact import read_manifest
from btx.graph.step import Step
from tests.support.command import btx
from tests.support.world import World

pytestmark = pytest.mark.slow
NEITHER: dict[str, Any] = {
    "run.workers": 2, "run.checkpoint_steps": 1, "run.max_memory": "70MB", "run.hang_minutes": 5, "data.directory": ".",
}  # fmt: skip
ENVIRONMENT: list[dict[str, Any]] = [
    {"run.threads": 2}, {"run.micro_batch": 1, "run.kernel": "reference", "evaluate.batch_tokens": 16}
]  # fmt: skip
TOLERANCE = 2e-5  # of weights after a few steps of AdamW in fp32, whose update is a share of its own size


@cache
def made(said: str = "{}") -> dict[str, Step]:
    """The published steps of the same recipe with some settings changed, by label, in a folder of its own."""
    world = World(Path(mkdtemp(prefix="btx-settings-")))
    for key, value in {
        "dense": {},
        "upcycle": {},
        "run.threads": 1,
        **json.loads(said),
    }.items():
        world.set(key, value)
    recipe = world.write()
    btx("run", str(recipe), cwd=world.root)
    return {
        label: step for label, step in Graph(load_recipe(recipe, []), world.root).steps.items() if step.kind != "given"
    }


def _digests(steps: dict[str, Step]) -> dict[str, tuple[str, str]]:
    return {label: (step.key, step.digest) for label, step in steps.items()}


@pytest.mark.parametrize("changed", [{}, NEITHER], ids=["again", "neither"])
def test_same_key_and_environment_are_the_same_bytes(changed: dict[str, Any]) -> None:
    plain, again = made(), made(json.dumps({"run.hang_minutes": 7, **changed}))  # made anew, whatever else is said
    assert _digests(again) == _digests(plain)
    assert len(plain) > 20


@pytest.mark.parametrize("changed", ENVIRONMENT, ids=["threads", "passes and kernel"])
def test_another_environment_is_the_same_key_and_the_same_but_for_rounding(changed: dict[str, Any]) -> None:
    plain, other = made(), made(json.dumps(changed))
    assert {label: step.key for label, step in other.items()} == {label: step.key for label, step in plain.items()}
    for label, step in plain.items():
        for file in step.folder.glob("*.safetensors"):
            there = load_file(other[label].folder / file.name)
            for name, tensor in load_file(file).items():
                assert (tensor - there[name]).abs().max() <= TOLERANCE, f"{label}: {name}"
    before, after = (json.loads((steps["evaluate"].folder / "results.json").read_text()) for steps in (plain, other))
    for model, row in before["bits_per_byte"].items():
        assert row == pytest.approx(after["bits_per_byte"][model], rel=1e-4)
    recorded = read_manifest(other["train:math"].folder)["environment"]["threads"]
    assert recorded == changed.get("run.threads", 1)


def test_a_setting_of_identity_makes_other_folders_and_leaves_those_above_it() -> None:
    plain, other = made(), made(json.dumps({"finetune.learning_rate": 3e-4}))
    rekeyed = {label for label, step in other.items() if step.key != plain[label].key}
    assert {"finetune", "evaluate", "export", "report"} <= rekeyed
    assert not rekeyed & {"train:math", "merge", "average", "dense", "tokens:math", "measure:merged"}
    same = {label: step for label, step in plain.items() if label not in rekeyed}
    assert _digests({label: other[label] for label in same}) == _digests(same)
