"""An export without an evaluation, measured by a later run; and the planned and actual cost of each step."""

from __future__ import annotations

import json
from pathlib import Path

from btx.graph.cost import Cost
from tests.support.command import btx
from tests.support.project import write_project
from tests.support.world import edit_json


def test_an_export_stands_without_an_evaluation_and_is_measured_later(tmp_path: Path) -> None:
    write_project(tmp_path)
    btx("export", "recipe.yaml", cwd=tmp_path)
    steps, card = tmp_path / "runs/pico/steps", tmp_path / "runs/pico/export/README.md"
    assert not list(steps.glob("measure-*"))
    assert "Nothing was measured." in card.read_text()
    assert "Wrong" not in btx("check", "runs/pico/export", cwd=tmp_path).stdout
    weights = (tmp_path / "runs/pico/export/model.safetensors").read_bytes()
    btx("run", "recipe.yaml", cwd=tmp_path)
    assert "Nothing was measured." not in card.read_text()
    assert "| finetuned |" in card.read_text()
    assert (tmp_path / "runs/pico/export/model.safetensors").read_bytes() == weights
    assert len(list(steps.glob("measure-*"))) == 8  # seed, two experts, average, merged, finetuned; two on select too

    manifest = json.loads((steps.parent / "train-math/btx.json").read_text())
    cost = Cost.read(manifest)
    assert cost is not None
    assert cost.tokens == manifest["facts"]["tokens"] == 3072
    assert cost.flops == manifest["facts"]["training_flops"] > 0
    assert cost.bytes == sum(entry["size"] for entry in manifest["files"].values())
    assert cost.peak_memory > 10**7
    assert cost.device_seconds == cost.wall_seconds > 0
    states, costs = btx("status", "recipe.yaml", cwd=tmp_path).stdout.split("\n\n")
    assert states.count("done") == len(states.splitlines()) - 1
    row = next(line for line in costs.splitlines() if line.startswith("train:math"))
    assert row.count("→") == 3  # FLOPs, memory and disk, planned and actual

    assert manifest["environment"].keys() == {"device", "instructions", "threads", "processes"}
    edit_json(steps.parent / "train-math/btx.json", environment={**manifest["environment"], "device": "GPU"})
    said = btx("status", "recipe.yaml", cwd=tmp_path).stdout
    assert said.count("done") == states.count("done")
    assert "Reused, though made in another environment (device GPU, here cpu): train:math." in said


def test_the_short_names_are_those_of_the_recipe_that_was_run_last(tmp_path: Path) -> None:
    """Even if everything was done already, since the printed results are read through them."""
    write_project(tmp_path)
    report = tmp_path / "runs/pico/report"
    found = []
    for sets in ([], ["--set", "evaluate.bootstrap=7"], []):
        btx("run", "recipe.yaml", *sets, cwd=tmp_path)
        found.append(report.resolve())
    assert found[0] == found[2] != found[1]
