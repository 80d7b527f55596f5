"""A comparison's arms are recipes, and its figures sum up: budgets, ledgers, decomposition, answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from btx.compare.arms import Arms, Trial
from btx.compare.rounds import Rounds
from btx.conversions.pipeline import Graph
from btx.conversions.planned import seed_config
from btx.conversions.registry import conversions, load_recipe
from btx.errors import RecipeError
from btx.models import flops
from btx.recipe.recipe import Recipe
from btx.report.comparison import judged, mean
from btx.report.comparison_page import page
from tests.support.project import write_project
from tests.support.reports import COMPARED

RATES = (1e-3, 2e-3)


def recipe_with(folder: Path, compare: dict[str, Any], **changes: Any) -> Recipe:
    """The pico project with a comparison."""
    path = write_project(folder)
    raw = yaml.safe_load(path.read_text()) | {"compare": {"rates": list(RATES), **compare}, **changes}
    path.write_text(yaml.safe_dump(raw))
    return load_recipe(path, [])


def test_every_conversion_that_takes_a_budget_spends_it_in_whole_steps(tmp_path: Path) -> None:
    able = [name for name, found in conversions().items() if found.spend]
    assert {"btx", "dense", "upcycle", "average", "scratch"} <= set(able)
    compare = {"arms": {name: {} for name in able}, "budgets": [16_384]}
    recipe = recipe_with(tmp_path, compare, sft={"data": ["items.jsonl"]})  # which it cannot do without
    arms, config = Arms(recipe), seed_config(recipe, tmp_path)
    for name in able:
        tokens = arms.budget(name, 0, config)
        trial = Trial(name, 0, tokens, arms.grid(name).together(1e-3), "select")
        planned = sum(training.tokens for training in arms.trainings(trial, config))
        assert tokens == 16_384
        assert abs(planned - tokens) <= 3  # of three trainings, each a whole number


def test_a_budget_of_flops_buys_each_arm_the_tokens_it_pays_for(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, {"arms": {"btx": {}, "dense": {}, "upcycle": {}}, "flops": [1e12]})
    arms, config = Arms(recipe), seed_config(recipe, tmp_path)
    tokens = {name: arms.budget(name, 0, config) for name in ("btx", "dense", "upcycle")}
    assert tokens["dense"] > tokens["btx"] > tokens["upcycle"]  # by what a token costs
    for name, count in tokens.items():
        trial = Trial(name, 0, count, arms.grid(name).together(1e-3), "select")
        paid = sum(flops.training_flops(t.config, t.tokens) for t in arms.trainings(trial, config))
        assert paid == pytest.approx(1e12, rel=1e-3)


def test_a_trial_is_what_a_recipe_written_by_hand_says(tmp_path: Path) -> None:
    """The same folders: a rate that was chosen is a number in it, and no parent."""
    arm = {"btx": {"after_merge": 0.25, "set": {"merge.router": "orthogonal"}}, "dense": {}}
    recipe = recipe_with(tmp_path, {"arms": arm, "budgets": [8192]})
    rounds = Rounds(recipe, tmp_path)
    trial = Trial("btx", 3, 8192, (2e-3, 5e-4), "test")
    (tmp_path / "hand.yaml").write_text((tmp_path / "recipe.yaml").read_text())
    by_hand = load_recipe(tmp_path / "hand.yaml", [
        "compare=null", "train.seed=3", "merge.seed=3",
        "domains.math.tokens=3072", "domains.code.tokens=3072", "finetune.tokens=2048", "train.learning_rate=2e-3",
        "finetune.learning_rate=5e-4", "merge.router=orthogonal",
    ])  # fmt: skip
    expected = Graph(by_hand, tmp_path).steps["measure:finetuned"]
    assert rounds.measure(trial).key == expected.key
    dense = rounds.measure(Trial("dense", 3, 8192, (2e-3,), "test"))
    assert dense.model.kind == "dense"
    assert rounds.measure(Trial("dense", 4, 8192, (2e-3,), "test")).key != dense.key


def test_a_domain_s_name_may_have_dots(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, {"arms": {"btx": {}, "dense": {}}, "budgets": [8192]}, domains={
        name: {"data": [f"corpora/{name[:4]}.jsonl"], "tokens": 3072} for name in ("math.v1.2", "code")
    })  # fmt: skip
    trial = Trial("btx", 0, 8192, RATES, "select")
    found = Arms(recipe).recipe_of(trial)
    assert found.domains["math.v1.2"].tokens == found.domains["code"].tokens == round(8192 * 6 / 14)


def test_with_nothing_after_the_merge_the_fresh_mixture_is_compared(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, {"arms": {"fresh": {"conversion": "btx", "after_merge": 0}, "dense": {}}})
    rounds = Rounds(recipe, tmp_path)
    assert rounds.arms.grid("fresh").ratios == (1.0,)
    trial = Trial("fresh", 0, 7168, (1e-3,), "select")
    assert rounds.measure(trial).model.kind == "merge"
    assert sum(t.tokens for t in rounds.arms.trainings(trial, seed_config(recipe, tmp_path))[:2]) == 7168


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ({"arms": {"btx": {}, "dens": {}}, "control": "btx"}, "no conversion 'dens'; did you mean 'dense'"),
        ({"arms": {"btx": {}, "dense": {"match": "total"}}}, "tokens that the seed was pretrained on are not known"),
        ({"arms": {"btx": {"set": {"merge.ruter": "random"}}, "dense": {}}}, "did you mean 'router'"),
        ({"arms": {"btx": {"after_merge": 1}, "dense": {}}}, "nothing is left for the experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where a run's folder would be
    recipe = recipe_with(tmp_path, compare)
    with pytest.raises(RecipeError, match=said):
        Rounds(recipe, tmp_path).check()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ({"arms": {"btx": {}, "upcycle": {}}}, "control is 'dense', and no arm is called that"),
        ({"rates": [1e-3, 2e-3, 9e-3]}, "must rise by one factor"),
        ({"seeds": [1, 1]}, "a seed stands there twice"),
        ({"budgets": [100], "flops": [1e9]}, "two ways to say one thing"),
        ({"budgets": [200, 100]}, "must rise, each once"),
        ({"flops": [1e9, 1e9]}, "must rise, each once"),
        ({"rates": [1e-3]}, "compare.rates: needs 2 entries or more"),
        ({"rates": [1e-3, 1.05e-3]}, "one factor of 1.1 or more"),
        ({"arms": {"dense": {}}}, "compare.arms: needs 2 entries or more"),
        ({"arms": {"dense": {}, "$x$ <b>": {"conversion": "btx"}}}, "cannot name an arm"),
        ({"arms": {"dense": {}, "seed": {"conversion": "btx"}}}, "'seed' is another row or column"),
        ({"arms": {"dense": {}, "Dense": {"conversion": "btx"}}}, "two arms are called 'dense' but for case"),
        ({"scratch": "scrach"}, "scratch is 'scrach', and no arm is called that"),
    ],
)  # fmt: skip
def test_a_section_that_contradicts_itself_is_refused(tmp_path: Path, compare: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_with(tmp_path, compare)


def test_the_terms_of_a_decomposition_sum_to_the_total() -> None:
    results = COMPARED | judged(COMPARED)
    terms = results["decomposition"][0]["terms"]
    assert [f"{t['from']} > {t['to']}" for t in terms] == [
        "seed > best expert of each domain", "best expert of each domain > average", "average > merged",
        "merged > final",
    ]  # fmt: skip
    btx = [mean(run["bits_per_byte"]) for run in results["runs"] if run["arm"] == "btx"]
    assert sum(t["change"] for t in terms) == pytest.approx(sum(btx) / 3 - 3.0)
    assert terms[0]["change"] == pytest.approx((1.5 + 2.0) / 2 - 3.0)


def test_verdicts_and_tax_are_paired_by_block() -> None:
    results = COMPARED | judged(COMPARED)
    verdicts = {one["arm"]: one for one in results["verdicts"]}
    assert verdicts["btx"]["mean"]["word"] == "better"
    assert verdicts["btx"]["mean"]["difference"] == pytest.approx(-0.149)
    assert verdicts["btx"]["domains"]["a"]["difference"] == pytest.approx(-0.2)
    assert verdicts["scratch"]["mean"]["word"] == "worse"
    taxes = {one["arm"]: one for one in results["tax"]}
    assert taxes["dense"]["mean"]["difference"] == pytest.approx(-0.5, abs=0.01)
    found = taxes["btx"]["equivalent"][0]
    assert found["sign"] == "="
    assert 6e9 < found["flops"] < 2.4e10
    assert found["of_total"] == pytest.approx(found["flops"] / 1.2e10)
    assert taxes["longer"]["equivalent"][0]["sign"] == "="


def test_the_page_opens_with_the_answer_and_stands_alone() -> None:
    results = COMPARED | judged(COMPARED)
    html = page(results)
    assert results["answer"].startswith("At 1,000 tokens after the seed, btx, longer are ahead of dense; scratch is")
    assert html.index('class="answer"') < html.index("<table")
    assert "t &lt;b&gt;" in html
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org/", "")
    assert "The optimum lies at the edge of what was tried: btx." in html
    one = {
        **results,
        "runs": [run for run in results["runs"] if not run["block"]],
        "seeds": {"0": results["seeds"]["0"]},
    }
    one |= judged(one)
    assert "one block, so no verdict" in one["answer"]
    assert "one block" in page(one)


def test_a_budget_is_told_in_the_unit_that_it_was_said_in() -> None:
    results = COMPARED | {"budgets": ["2G FLOPs"]}
    results |= judged(results)
    assert results["answer"].startswith("At 2G FLOPs after the seed, ")
    assert "<h2>2G FLOPs after the seed</h2>" in page(results)


def test_an_arm_that_misses_its_tokens_by_its_whole_steps_is_named() -> None:
    assert judged(COMPARED)["notes"] == []
    runs = [run | {"tokens": 900} if run["arm"] == "btx" else run for run in COMPARED["runs"]]
    assert judged(COMPARED | {"runs": runs})["notes"] == [
        "btx took 11% more tokens than it was given at 1,000 tokens, as each of its trainings is a whole number of "
        "steps."
    ]


def test_a_domain_with_few_documents_is_named() -> None:
    results = COMPARED | {"documents": {"a": 1, "b": 10}}
    results |= judged(results)
    assert results["notes"] == ["a is scored on 1 document, so its numbers say little about other text."]
    assert results["notes"][0] in page(results)
    assert "Held-out documents: a 1, b 10." in page(results)
