"""Sparse upcycling: copies of the seed, trained on as many tokens as all of BTX, measured beside the other models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.conversions.upcycle import Upcycled
from btx.errors import RecipeError
from btx.models import model
from btx.recipe.settings import RunSettings
from tests.support.command import btx
from tests.support.project import write_project


def upcycled(recipe: Path, *overrides: str) -> Upcycled:
    """The upcycled step of a recipe."""
    step = Graph(load_recipe(recipe, list(overrides)), recipe.parent).steps["upcycled"]
    assert isinstance(step, Upcycled)
    return step


def test_it_takes_the_rules_of_the_finetuning_and_the_optimiser_of_training(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    plain = upcycled(recipe, "upcycle={}", "finetune.top_k=1", "finetune.learning_rate=1e-5")
    said = load_recipe(recipe, [])
    assert plain.settings.top_k == 1
    assert plain.settings.learning_rate == said.train.learning_rate
    assert plain.settings.tokens == said.tokens_in_all
    assert plain.merge.settings.copies == len(said.models)
    own = upcycled(recipe, "upcycle={experts: 3, top_k: 2, learning_rate: 1e-4, tokens: 512, router: orthogonal}")
    assert (own.merge.settings.copies, own.settings.top_k, own.settings.learning_rate) == (3, 2, 1e-4)
    assert (own.settings.tokens, own.merge.settings.router) == (512, "orthogonal")
    steps = Graph(load_recipe(recipe, ["upcycle={top_k: 1}", "finetune.top_k=2"]), tmp_path).steps
    rules = {name: getattr(steps[f"measure:{name}"], "rule") for name in ("seed", "merged", "finetuned", "upcycled")}  # noqa: B009
    assert {name: rule and rule.experts_per_token for name, rule in rules.items()} == {
        "seed": None, "merged": 2, "finetuned": 2, "upcycled": 1,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"upcycle\.top_k is 4, but there are 3 copies"):
        load_recipe(recipe, ["upcycle={experts: 3, top_k: 4}"])
    assert "upcycled" not in Graph(load_recipe(recipe, []), tmp_path).steps


def test_it_starts_as_the_seed_and_is_trained_measured_and_reported_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    sets = ["upcycle={tokens: 1024}", "domains.math.tokens=512", "domains.code.tokens=512"]
    btx("run", "recipe.yaml", *(part for one in sets for part in ("--set", one)), cwd=tmp_path)
    results = json.loads((tmp_path / "runs/pico/report/results.json").read_text())
    assert list(results["bits_per_byte"])[-1] == "upcycled"
    assert results["cost"]["upcycled"]["tokens"] == 1024
    assert set(results["routing"]) == {"merged", "finetuned", "upcycled"}
    step = upcycled(recipe, *sets)
    where = RunSettings(device="cpu")
    copies, seed = (model.load(s.folder, where=where).eval() for s in (step.merge, step.merge.branch.seed))
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(copies(input_ids=ids).logits, seed(input_ids=ids).logits, atol=1e-5, rtol=0)
    table = btx("plan", "recipe.yaml", "--set", "upcycle={}", cwd=tmp_path).stdout
    assert any(line.split()[:1] == ["upcycled"] for line in table.splitlines())
