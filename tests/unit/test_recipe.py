"""The recipe: what YAML may do, how numbers are read, and what decides the identity of a step."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from btx.cli import graph_of
from btx.errors import RecipeError
from btx.merge.settings import MergeSettings
from btx.recipe import Recipe, load_recipe, schema
from btx.settings import FinetuneSettings, RunSettings, Settings, TrainSettings
from btx.strict_yaml import parse_yaml
from tests.faults.world import World

SMALL: dict[str, Any] = {"name": "r", "seed": {"checkpoint": "s"}, "domains": {"a": {"data": ["a"], "tokens": 5}}}


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
        ("name: [", r"no valid YAML: .*line \d"),
        ("a:\n\tb: 1\n", r"a tab\? .*line 2"),
        ("a: 1\nb: 2\na: 3\n", "key 'a' stands twice, line 3"),
        ("x: &a [1]\ny: *a\n", "aliases .* line 2"),
        ("a: &a [x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n", "aliases"),
        ("x: !!python/object/apply:os.system [echo]\n", "python/object"),
        ("x: !!float abc\n", "no valid YAML"),
        ("? [a, b]\n: c\n", "a key must be a word, line 1"),
        ("no: {data: [x]}\n", "reads the key no as true or false, line 1; put it in quotes"),
        ("name: 2024-13-45\n", "month"),
        ("name: !!int x\n", "no valid YAML"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a: \0\n", "no valid YAML"),
        ("[" * 5000, "nested without end"),
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
    assert set(schema()["properties"]) == set(Recipe.model_fields)
    assert schema()["additionalProperties"] is False


def test_the_recipes_that_come_along_are_read() -> None:
    found = sorted((Path(__file__).parents[2] / "pipelines").glob("*.yaml"))
    assert [load_recipe(path, []).name for path in found]


# ---- identity ----


LABELS = ("tokens:math", "branch", "train:math", "average", "merge", "finetune", "evaluate", "export", "report")


def keys(world: World) -> dict[str, str]:
    """The keys of all steps."""
    return {label: world.key(label) for label in LABELS}


@pytest.mark.parametrize(
    "key",
    ["directory", "workers", "kernel", "micro_batch", "threads", "checkpoint_minutes", "checkpoint_steps", "launch",
     "report_to", "device", "max_memory"],
)  # fmt: skip
def test_how_a_run_is_done_changes_no_key(world: World, key: str) -> None:
    before = keys(world)
    values = {"directory": "elsewhere", "kernel": "eager", "launch": "x.yaml", "report_to": ["wandb"], "device": "auto"}
    world.set(f"run.{key}", values.get(key, 3))
    assert keys(world) == before
    assert key in RunSettings.model_fields


CHANGES: dict[str, tuple[Any, str]] = {
    "train.sequence_length": (8, "train:math"),
    "train.batch_tokens": (64, "train:math"),
    "train.learning_rate": (2e-4, "train:math"),
    "train.min_learning_rate": (0.2, "train:math"),
    "train.warmup_steps": (1, "train:math"),
    "train.weight_decay": (0.2, "train:math"),
    "train.betas": ([0.8, 0.9], "train:math"),
    "train.epsilon": (1e-7, "train:math"),
    "train.clip": (2.0, "train:math"),
    "train.precision": ("bf16", "train:math"),
    "train.gradient_checkpointing": (True, "train:math"),
    "train.dtype": ("bf16", "train:math"),
    "train.seed": (1, "train:math"),
    "train.max_bad_steps": (5, "train:math"),
    "domains.math.tokens": (128, "train:math"),
    "data.holdout": (0.1, "tokens:math"),
    "data.select": (0.1, "tokens:math"),
    "data.ignore": (["x"], "tokens:math"),
    "data.date": ("2026-01-31", "tokens:math"),
    "data.valid_bytes": (99, "tokens:math"),
    "data.loss_on": ("completion", "tokens:math"),
    "merge.include_seed": (False, "average"),
    "merge.shared": ("linear", "average"),
    "merge.router_entropy": (0.5, "merge"),
    "merge.router": ("orthogonal", "merge"),
    "merge.experts": ("split", "merge"),
    "merge.chunks": (3, "merge"),
    "merge.router_tokens": (99, "merge"),
    "merge.seed": (1, "merge"),
    "merge.dtype": ("bf16", "average"),
    "merge.layers": ([0], "merge"),
    "merge.copies": (2, "merge"),
    "merge.reinitialize": (0.5, "merge"),
    "merge.shared_expert": ("seed", "merge"),
    "finetune.top_k": (1, "finetune"),
    "finetune.balance": ({"form": "switch"}, "finetune"),
    "finetune.mix": ({"math": 1, "law": 2}, "finetune"),
    "finetune.tokens": (96, "finetune"),
    "evaluate.tokens": (9, "evaluate"),
    "evaluate.split": ("select", "evaluate"),
    "evaluate.precision": ("bf16", "evaluate"),
    "export.license": ("mit", "export"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_changes_the_step_that_it_belongs_to_and_all_after_it_and_none_before(world: World, key: str) -> None:
    value, first = CHANGES[key]
    before = keys(world)
    world.set(key, value)
    after = keys(world)
    changed = [label for label in LABELS if before[label] != after[label]]
    assert changed[0] == first
    assert changed[-1] == "report"
    missing = [label for label in LABELS[LABELS.index(first) :] if label not in changed]
    assert missing in ([], ["branch"], ["average"])


def test_a_builtin_seed_depends_on_no_setting_that_it_overrides_or_has_no_use_for(world: World) -> None:
    """Its learning rate and batch are its own, pretraining learns every token, a tokenizer's training no date."""
    world.set("seed", {"checkpoint": "builtin", "data": ["data/math.jsonl"]})
    world.set("domains", {"math": {"data": ["data/law.jsonl"], "tokens": 64}})
    before = {label: world.key(label) for label in ("tokenizer", "tokens:seed", "seed", "train:math")}
    for key, value in {"train.learning_rate": 5e-5, "data.loss_on": "completion"}.items():
        world.set(key, value)
        for label in ("tokenizer", "tokens:seed", "seed"):
            assert world.key(label) == before[label], (key, label)
    assert world.key("train:math") != before["train:math"]
    world.set("data.valid_bytes", 99)
    assert world.key("tokenizer") == before["tokenizer"]
    world.set("seed.builtin", {"learning_rate": 1e-3})
    assert world.key("seed") != before["seed"]


def test_every_setting_of_training_and_merge_is_tried() -> None:
    assert {f"train.{name}" for name in TrainSettings.model_fields} <= set(CHANGES)
    assert {f"merge.{name}" for name in MergeSettings.model_fields} <= set(CHANGES)


def test_the_order_of_the_experts_counts(world: World) -> None:
    before = keys(world)
    world.recipe["domains"] = dict(reversed(world.recipe["domains"].items()))
    after = keys(world)
    assert after["train:math"] == before["train:math"]
    assert after["merge"] != before["merge"]


def test_the_same_content_under_another_path_has_the_same_keys(world: World, tmp_path: Path) -> None:
    before = keys(world)
    for part in ("data/math.jsonl", "law"):
        shutil.move(world.root / part, tmp_path / f"moved-{Path(part).name}")
    world.set("domains.math.data", ["moved-math.jsonl"])
    world.set("domains.law.checkpoint", "./moved-law/")
    assert keys(world) == before
    with (tmp_path / "moved-math.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert keys(world)["tokens:math"] != before["tokens:math"]
    assert keys(world)["branch"] == before["branch"]


def test_the_same_bytes_read_as_another_kind_are_another_content(world: World) -> None:
    before = world.key("tokens:math")
    shutil.copy(world.math, world.root / "math.txt")
    world.set("domains.math.data", ["math.txt"])
    assert world.key("tokens:math") != before


def test_the_tokenizer_of_a_builtin_seed_does_not_depend_on_where_its_data_lies(world: World) -> None:
    world.set("seed", {"checkpoint": "builtin", "data": ["data/math.jsonl"]})
    world.set("domains", {"math": {"data": ["data/law.jsonl"], "tokens": 64}})
    before = world.key("tokenizer")
    shutil.copy(world.math, world.root / "moved.jsonl")
    world.set("seed.data", ["moved.jsonl"])
    assert world.key("tokenizer") == before


def test_nested_execution_settings_are_no_identity() -> None:
    class Outer(Settings):
        where: RunSettings = RunSettings()
        n: int = 0

    assert Outer(where=RunSettings(threads=3)).identity() == Outer().identity() == {"where": {}, "n": 0}


def test_what_a_domain_is_called_decides_neither_its_experts_key_nor_the_order_of_its_data(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal keys mean equal results, so nothing that is not hashed may seed the sampler."""
    shutil.copy(world.math, world.root / "same.jsonl")
    world.recipe["domains"]["twin"] = {**world.recipe["domains"]["math"], "data": ["same.jsonl"]}
    steps = [graph_of(world.write(), ()).steps[f"train:{name}"] for name in ("math", "twin")]
    assert steps[0].key == steps[1].key
    streams: list[Any] = []
    monkeypatch.setattr("btx.steps.train.fit", lambda _step, **how: streams.append((*how["tokens"], how["weights"])))
    for step in steps:
        step.run(world.root, world.root, lambda _event: None)
    assert streams[0] == streams[1]
