"""The comparison as an instrument: A/A shows no difference, a planted effect is found, and nothing runs twice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command import btx
from tests.support.project import write_project

pytestmark = pytest.mark.slow
RECIPE: dict[str, Any] = {
    "name": "pico",
    "seed": {"checkpoint": "builtin", "builtin": {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 96, "layers": 2, "heads": 2, "tokens": "60k",
        "learning_rate": 3e-3, "batch_tokens": 1024,
    }},
    "domains": {name: {"data": [f"builtin:{name}"], "tokens": "10k"} for name in ("math", "code")},
    "train": {"sequence_length": 128, "batch_tokens": 1024, "precision": "fp32"},
    "finetune": {"tokens": "10k"},
    "evaluate": {"tokens": "6k", "precision": "fp32"},
    "compare": {
        "arms": {
            "dense": {}, "again": {"conversion": "dense", "set": {"dense.seed": 100}},
            "less": {"conversion": "dense", "tokens": 0.8}, "btx": {"after_merge": 0.5},
        },
        "rates": [4e-3, 8e-3], "extensions": 0, "screen": 1, "seeds": [0, 1, 2],
    },
    "run": {"device": "cpu", "workers": 2, "threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """A comparison by the real command: its folder, its results and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    shown = btx("compare", "recipe.yaml", cwd=folder, seconds=1500)
    results = json.loads((folder / "runs/pico/comparison/comparison.json").read_text())
    return folder, results, shown.stdout + shown.stderr


def test_the_same_thing_twice_is_not_told_apart_and_a_planted_effect_is_found(compared: Any) -> None:
    _, results, shown = compared
    verdicts = {one["arm"]: one["mean"] for one in results["verdicts"]}
    assert verdicts["again"]["word"] == "cannot tell"
    assert verdicts["less"]["word"] == "worse"
    assert verdicts["less"]["difference"] > verdicts["again"]["detectable"] > abs(verdicts["again"]["difference"])
    behind = re.search(r"seed, ([^;]*) (is|are) behind dense", " ".join(shown.split()))
    assert behind
    assert "less" in behind[1].split(", ")


def test_arms_get_the_same_tokens_and_as_many_trials(compared: Any) -> None:
    _, results, _ = compared
    tokens = {run["arm"]: run["cost"]["tokens"] for run in results["runs"]}
    assert tokens["dense"] == tokens["again"] == 30 * 1024
    assert tokens["less"] == 24 * 1024
    assert abs(tokens["btx"] - tokens["dense"]) <= 2 * 1024  # whole steps of each stage
    assert {one["equivalents"] for one in results["choices"]} == {4.0}
    cost = {run["arm"]: run["cost"] for run in results["runs"]}
    assert cost["dense"]["path_steps"] == cost["dense"]["steps"]
    assert cost["btx"]["path_steps"] == pytest.approx(0.75 * cost["btx"]["steps"], abs=1)  # two experts at once


def test_rates_are_chosen_on_select_and_finals_scored_on_test(compared: Any) -> None:
    folder, results, _ = compared
    splits = set()
    for one in (folder / "runs/pico/steps").glob("measure-*/btx.json"):
        manifest = json.loads(one.read_text())
        splits.add((manifest["identity"]["settings"]["split"], "tests" if "#0" not in manifest["step"] else "first"))
    assert ("select", "tests") not in splits  # the other blocks are never searched on
    assert {"select", "test"} == {split for split, _ in splits}
    for choice in results["choices"]:
        assert choice["chosen"] == min(choice["screened"], key=choice["screened"].__getitem__)


def test_what_is_done_is_not_done_again(compared: Any) -> None:
    folder, results, _ = compared
    steps = folder / "runs/pico/steps"
    before = {path.name: path.stat().st_mtime_ns for path in steps.glob("*/btx.json")}
    shutil.rmtree((folder / "runs/pico/comparison").resolve())
    again = btx("compare", "recipe.yaml", cwd=folder)
    assert "finals; 0 trainings and 1 other steps to do" in again.stderr
    assert json.loads((folder / "runs/pico/comparison/comparison.json").read_text()) == results
    assert {path.name: path.stat().st_mtime_ns for path in steps.glob("*/btx.json") if path.name in before} == before
    nothing = btx("compare", "recipe.yaml", cwd=folder)
    assert "to do" not in nothing.stderr
    assert results["answer"] in " ".join(nothing.stdout.split())


def test_trainings_that_diverge_are_the_worst_and_are_not_repeated(tmp_path: Path) -> None:
    """By a loss that is no number, by steps that are all skipped, and by weights that give no finite loss."""
    path = write_project(tmp_path)
    arms = {"dense": {}, "btx": {}, "btm": {}, "upcycle": {"set": {"upcycle.max_grad_norm": 1e30}}}
    compare = {"arms": arms, "rates": [1e-3, 1e6, 1e15], "budgets": [3000], "seeds": [0], "screen": 1, "extensions": 0}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"compare": compare}))
    shown = btx("compare", path.name, cwd=tmp_path)
    results = json.loads((tmp_path / "runs/pico/comparison/comparison.json").read_text())
    assert "counts as the worst" in shown.stderr
    assert {one["arm"]: len(one["diverged"]) > 0 for one in results["choices"]} == dict.fromkeys(arms, True)
    assert {run["arm"]: max(run["rates"]) < 1 for run in results["runs"]} == dict.fromkeys(arms, True)
    assert "to do" not in btx("compare", path.name, cwd=tmp_path).stderr
