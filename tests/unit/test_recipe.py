"""The recipe: strict YAML, and how numbers are read."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from btx.conversions.registry import load_recipe, recipe_model, schema
from btx.errors import RecipeError
from btx.recipe.merge_settings import MergeSettings
from btx.recipe.recipe import Recipe
from btx.recipe.settings import FinetuneSettings, TrainSettings
from btx.recipe.strict_yaml import parse_yaml
from tests.support.project import SMALL


def loaded(tmp_path: Path, text: str, *sets: str) -> Recipe:
    """The recipe of a YAML text."""
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, list(sets))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "holds no recipe: it must be a mapping"),
        ("", "holds no recipe"),
        ("name: [", r"not valid YAML: .*line \d"),
        ("a:\n\tb: 1\n", r"a tab\? .*line 2"),
        ("a: 1\nb: 2\na: 3\n", "key 'a' appears twice, line 3"),
        ("x: &a [1]\ny: *a\n", "aliases .* line 2"),
        ("a: &a [x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n", "aliases"),
        ("x: !!python/object/apply:os.system [echo]\n", "python/object"),
        ("x: !!float abc\n", "not valid YAML"),
        ("? [a, b]\n: c\n", "a key must be a word, line 1"),
        ("no: {data: [x]}\n", "reads the key no as true or false, line 1; put it in quotes"),
        ("name: 2024-13-45\n", "month"),
        ("name: !!int x\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a: \0\n", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        loaded(tmp_path, text)


@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"# \n\t,?%@0.~\0é"), max_size=40))
def test_any_text_is_parsed_or_refused_in_a_sentence(text: str) -> None:
    with suppress(RecipeError):  # any other error would fail the test
        parse_yaml(text, "it")


def test_a_recipe_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe .*nowhere\.yaml.*btx init"):
        load_recipe(tmp_path / "nowhere.yaml", [])
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path, [])
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin\.yaml cannot be read: .*utf-8"):
        load_recipe(tmp_path / "latin.yaml", [])


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert loaded(tmp_path, "\ufeff" + yaml.safe_dump(SMALL)).name == "r"


@pytest.mark.parametrize(
    ("said", "meant"),
    [("400k", 400_000), ("1.5M", 1_500_000), ("201B", 201 * 10**9), ("2T", 2 * 10**12), ("4_096", 4096), ("1e6", 10**6),
     ("0.3k", 300), ("1.001k", 1001), (" 7 ", 7), (7, 7), ("2.5e3", 2500)],
)  # fmt: skip
def test_counts_are_read_as_people_write_them(said: Any, meant: int) -> None:
    assert FinetuneSettings(tokens=said).tokens == meant


@given(st.integers(1, 10**15))
def test_a_count_in_thousands_is_that_count(number: int) -> None:
    assert FinetuneSettings(tokens=f"{number / 1000:.3f}k").tokens == number or number > 2**50
    assert FinetuneSettings(tokens=str(number)).tokens == number


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_a_rate_that_yaml_reads_as_text_is_the_number_that_was_meant(tmp_path: Path, text: str) -> None:
    recipe = loaded(tmp_path, yaml.safe_dump(SMALL) + f"train: {{learning_rate: {text}}}\n")
    assert recipe.train.learning_rate == 1e-4


def test_overrides_are_read_as_yaml_and_may_make_sections(tmp_path: Path) -> None:
    sets = ("train.seed=3", "data.holdout=0.5", "seed.data=[x, y]", "domains.b={checkpoint: b}", "name=other",
            "domains.a.tokens=2k", "merge.shared=linear", "domains.a.valid=[v=w]")  # fmt: skip
    recipe = loaded(tmp_path, yaml.safe_dump(SMALL) + "train:\n", *sets)
    assert (recipe.train.seed, recipe.data.holdout, recipe.seed.data) == (3, 0.5, ["x", "y"])
    assert (recipe.name, recipe.models, recipe.domains["a"].tokens) == ("other", ["a", "b", "seed"], 2000)
    assert (recipe.merge.shared.method, recipe.domains["a"].valid) == ("linear", ["v=w"])


def test_what_the_finetuning_does_not_say_of_the_optimiser_is_as_in_train() -> None:
    train = {"sequence_length": 256, "batch_tokens": 1024, "learning_rate": 5e-4}
    recipe = Recipe.model_validate({**SMALL, "train": train, "finetune": {"sequence_length": 512, "tokens": 7}})
    done = recipe.finetuning
    assert (done.sequence_length, done.batch_tokens, done.learning_rate, done.tokens) == (512, 1024, 5e-4, 7)
    assert {n for n in TrainSettings.model_fields if getattr(done, n) != getattr(recipe.train, n)} == {
        "sequence_length"
    }


@pytest.mark.parametrize(("routing", "models"), [("switch", 2), ("soft", 2), ("sample_top1", 2), ("top_k", 2)])
def test_every_routing_goes_with_two_experts(routing: str, models: int) -> None:
    recipe = Recipe.model_validate({**SMALL, "finetune": {"routing": routing}})
    assert len(recipe.models) == models


def test_split_experts_count_their_chunks() -> None:
    more = {"merge": {"experts": "split", "chunks": 3}, "finetune": {"top_k": 6}}
    assert Recipe.model_validate({**SMALL, **more}).finetune.top_k == 6
    with pytest.raises(ValueError, match="makes 6 experts"):
        Recipe.model_validate({**SMALL, **more, "finetune": {"top_k": 7}})


def test_the_schema_holds_for_the_embedded_recipe_and_names_every_section() -> None:
    assert set(schema()["properties"]) == {*Recipe.model_fields, *recipe_model().conversions} >= {"dense", "upcycle"}
    assert schema()["additionalProperties"] is False


def test_the_recipes_that_come_along_are_read() -> None:
    found = sorted((Path(__file__).parents[2] / "pipelines").glob("*.yaml"))
    assert [load_recipe(path, []).name for path in found]


@pytest.mark.parametrize(
    ("said", "about"),
    [
        ("train.clip=2", r"train\.clip: this key is called max_grad_norm now\."),
        ("train.min_learning_rate=0", r"train\.min_learning_rate: this key is called min_lr_ratio now\."),
        ("dense.min_learning_rate=0", r"dense\.min_learning_rate: this key is called min_lr_ratio now\."),
        ("data.loss_on=completion", r"data\.loss_on: this key is called loss_mask now\."),
        ("finetune.balance.form=btx", r"finetune\.balance\.form: this key is called type now\."),
        ("merge.experts=one", r"merge\.experts: one is called per_model now\."),
        ("merge.experts=two", r"merge\.experts: should be 'per_model', .*found 'two'"),
        ("train.form=btx", r"train\.form: there is no such key"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path, said: str, about: str) -> None:
    with pytest.raises(RecipeError, match=about):
        loaded(tmp_path, json.dumps(SMALL), said)


@pytest.mark.parametrize(
    ("merge", "domains", "router"),
    [
        ({}, 2, "activations"),
        ({}, 1, "random"),
        ({}, 0, "random"),
        ({"experts": "blend"}, 2, "random"),
        ({"experts": "split"}, 2, "activations"),
        ({"copies": 2}, 2, "random"),
        ({"copies": 2, "reinitialize": 0.5}, 2, "activations"),
        ({"router": "orthogonal"}, 2, "orthogonal"),
        ({"router": "embeddings"}, 1, "embeddings"),
    ],
)
def test_the_router_is_made_from_activations_where_it_can_be(merge: dict[str, Any], domains: int, router: str) -> None:
    assert MergeSettings(**merge).resolved(domains, 500).router == router


@pytest.mark.parametrize(
    ("said", "trained_on", "tokens"),
    [
        ("auto", 500, 4_000),
        ("auto", 9_000, 9_000),
        ("auto", 30_000, 20_000),
        ("auto", 0, 20_000),
        (700, 500, 700),
        ("30k", 500, 30_000),
    ],
)
def test_a_router_from_data_reads_about_as_much_of_a_domain_as_an_expert_is_trained_on(
    said: Any, trained_on: int, tokens: int
) -> None:
    """`0`: all experts were trained elsewhere."""
    assert MergeSettings(router_tokens=said).resolved(2, trained_on).router_tokens == tokens
