"""The dense control: as many tokens as all of BTX, on the same data, in the same tables."""

from __future__ import annotations

import json
from pathlib import Path

from btx.cli.plan import rows
from btx.conversions.dense import Dense
from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from tests.support.command import btx
from tests.support.project import write_project


def control(recipe: Path, *overrides: str) -> Dense:
    """The control's step of a recipe."""
    step = Graph(load_recipe(recipe, list(overrides)), recipe.parent).steps["dense"]
    assert isinstance(step, Dense)
    return step


def test_its_budget_is_what_experts_and_finetuning_take_in_whole_steps(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    plain = control(recipe, "dense={}")
    assert plain.budget == 2 * 3072 + 1024
    assert {n: round(w) for n, w in plain.weights.items()} == {"math": 3072 + 341, "code": 3072 + 341, "seed": 341}
    said = load_recipe(recipe, []).train
    assert plain.train.model_dump() == said.model_dump(exclude={"trainable"})
    odd = control(recipe, "dense={}", "domains.math.tokens=3000", "finetune.batch_tokens=512")
    assert odd.budget == 2 * 3072 + 1024  # 3,000 tokens are 12 steps of 256
    said = control(recipe, "dense={tokens: 512, learning_rate: 3e-4, mix: {math: 1, code: 3}}")
    assert (said.budget, said.train.learning_rate) == (512, 3e-4)
    assert said.weights == {"math": 1.0, "code": 3.0, "seed": 0.0}
    assert "dense" not in Graph(load_recipe(recipe, []), tmp_path).steps


def test_it_is_trained_measured_and_reported_beside_the_others(tmp_path: Path) -> None:
    write_project(tmp_path)
    shown = btx("run", "recipe.yaml", "--set", "dense={}", cwd=tmp_path)
    results = json.loads((tmp_path / "runs/pico/report/results.json").read_text())
    assert list(results["bits_per_byte"])[-2:] == ["finetuned", "dense"]
    assert results["cost"]["dense"]["tokens"] == sum(
        cost["tokens"] for name, cost in results["cost"].items() if name != "dense"
    )
    assert "dense" in shown.stdout
    table = btx("plan", "recipe.yaml", "--set", "dense={}", cwd=tmp_path).stdout
    assert any(line.split()[:1] == ["dense"] for line in table.splitlines())


def test_a_training_says_what_memory_it_needs_before_it_starts(tmp_path: Path) -> None:
    """By the plan's formula, from the folders of its parents."""
    recipe = write_project(tmp_path)
    graph = Graph(load_recipe(recipe, ["dense={}"]), tmp_path)
    planned = {row.label: row.memory for row in rows(graph.recipe, tmp_path)}
    for label in ("train:math", "dense"):
        assert graph.steps[label].needs == planned[label] > 0
    assert graph.steps["tokens:math"].needs == 0
