"""Arms that cannot be compared are refused before anything runs, and each setting of an arm has an effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from btx.cli.main import main
from btx.compare.arms import Trial, flops_of
from btx.compare.checks import check_arms
from btx.compare.price import bounds
from btx.conversions.planned import Training, seed_config
from btx.errors import RecipeError
from btx.models import flops
from btx.recipe.settings import TrainSettings
from btx.steps.train import Train
from tests.support.compared import rounds_of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's folder is relative to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"conversion": "btx", "set": {"evaluate.split": "test"}}, "set: evaluate.split changes the seed, the text"),
        ({"conversion": "btx", "set": {"domains.math.data": ["corpora/code.jsonl"]}}, "domains.math.data changes"),
        ({"conversion": "btx", "set": {"merge.router": "orthogonal", "train.sequence_length": 32}},
         "set: train.sequence_length changes"),
        ({"conversion": "dense", "set": {"name": "other"}}, "name changes .* the folder of the run"),
        ({"conversion": "btx", "set": {"train.learning_rate": 5}}, "train.learning_rate changes nothing in this arm"),
        ({"conversion": "dense", "set": {"dense.seed": 1, "merge.router": "orthogonal"}},
         "merge.router changes nothing .* dense does not read it"),
        ({"conversion": "dense", "set": {"dense.tokens": 5}}, "dense.tokens changes nothing"),
        ({"conversion": "dense", "after_merge": 0.5}, "after_merge is the share .* dense has none"),
        ({"conversion": "dense"}, "dense and x are the same in everything.*set: {dense.seed: 100}"),
    ],
)  # fmt: skip
def test_an_arm_that_cannot_be_compared_is_refused(tmp_path: Path, arm: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_arms(rounds_of(tmp_path, {"x": arm}))
    assert not (tmp_path / "runs").exists()


def test_settings_with_an_effect_pass_also_where_one_needs_the_other(tmp_path: Path) -> None:
    check_arms(rounds_of(tmp_path, {
        "btx": {}, "again": {"conversion": "dense", "set": {"dense.seed": 100}},
        "three": {"conversion": "btx", "set": {"merge.copies": 2, "finetune.top_k": 5}},
        "slow": {"conversion": "btx", "set": {"finetune.learning_rate": 1e-4}},
        "half": {"conversion": "btx", "after_merge": 0.5},
    }))  # fmt: skip


@pytest.mark.parametrize("said", [{"merge.experts": "blend"}, {"merge.copies": 2, "finetune.top_k": 3}])
def test_an_arm_may_change_what_decides_an_automatic_setting(tmp_path: Path, said: dict[str, Any]) -> None:
    """Blended experts belong to no domain, so that their routers cannot start from activations as the others' do."""
    rounds = rounds_of(tmp_path, {"btx": {}, "other": {"conversion": "btx", "set": said}})
    check_arms(rounds)
    plan = CliRunner().invoke(main, ["plan", str(tmp_path / "recipe.yaml"), "--tflops", "1"])
    assert plan.exit_code == 0, plan.output
    assert "btx compare: " in plan.output


def test_a_seed_that_an_arm_sets_counts_on_from_block_to_block(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, {"again": {"conversion": "dense", "set": {"dense.seed": 100}}})
    seeds = [rounds.arms.recipe_of(Trial("again", n, 4096, (1e-3,), "test")).sections["dense"].seed for n in (0, 1)]  # type: ignore[attr-defined]
    assert seeds == [100, 101]


def test_a_section_written_as_a_mapping_keeps_the_rest_of_it(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, {"x": {"conversion": "btx", "set": {"finetune": {"trainable": "router"}}}})
    found = rounds.arms.recipe_of(Trial("x", 0, 4096, (1e-3, 1e-3), "test")).finetune
    assert (found.trainable, found.top_k) == ("router", 2)


def test_a_mix_that_is_said_stays(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, {"x": {"conversion": "dense", "set": {"dense.mix": {"math": 1}}}})
    for arm, weights in (("x", {"math": 1, "code": 0, "seed": 0}), ("dense", None)):
        model = rounds.measure(Trial(arm, 0, 4096, (1e-3,), "test")).model
        assert (model.weights == weights) is (arm == "x")  # type: ignore[attr-defined]


def test_costs_are_those_of_whole_steps(tmp_path: Path) -> None:
    """What the plan says at least and at most is what the ledger has if no grid is extended."""
    rounds = rounds_of(tmp_path, {"none": {"conversion": "btx", "after_merge": 0}}, budgets=[100], screen=1,
                       extensions=0, seeds=[0])  # fmt: skip
    config = seed_config(rounds.recipe, tmp_path)
    settings = TrainSettings(sequence_length=64, batch_tokens=256)
    assert flops_of(Training("x", config, 100, settings)) == flops.training_flops(config, 256)
    trial = Trial("none", 0, 100, (1e-3,), "select")
    planned = [t.label for t in rounds.arms.trainings(trial, config)]
    assert planned == [s.label.removesuffix(f" {trial.mark}") for s in rounds.graph(trial).steps.values()
                       if isinstance(s, Train)]  # fmt: skip
    least, most = bounds(rounds)
    step = flops.training_flops(config, 256)
    assert least.trainings == (2 + 2) * (1 + 2)  # two rates and two beside the best, of dense and of two experts
    assert least.flops == least.trainings * step
    assert most.flops == (least.trainings + 3) * step  # the finals, of other rates than the middle's
