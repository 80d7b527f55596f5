"""The search for a real seed's rates: it scores on the select split, and climbs to the best rate."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import write_project

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "pipelines/sweep.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_score_is_that_of_the_recipe_on_the_select_split(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    row = sweep.Sweep(recipe, ["data.select=0.2"]).score("merge", train="1e-3")
    graph = sweep.graph_of(recipe, ("data.select=0.2", "evaluate.split=select", "train.learning_rate=1e-3"))
    measured = graph.steps["measure:merged"]
    assert measured.settings.split == "select"
    assert row == [found["bits_per_byte"] for found in measured.read().numbers.values()]
    assert f"| 1e-3 |  |  | merge | {row[0]:.3f} | {row[1]:.3f} |" in capsys.readouterr().out


@pytest.mark.parametrize(("best", "tried"), [("c", "bcd"), ("a", "abcd"), ("f", "bcdef")])
def test_a_climb_ends_at_the_least_cost_and_tries_one_beyond_it(sweep: Any, best: str, tried: str) -> None:
    seen = []
    assert sweep.climb(tuple("abcdef"), lambda rate: seen.append(rate) or abs(ord(rate) - ord(best))) == best
    assert "".join(sorted(seen)) == tried
