"""Each domain's expert made its own way, and the mixture of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from btx.checkpoints.reader import opened
from btx.cli.main import graph_of as main_graph
from btx.cli.main import main
from btx.cli.plan import rows
from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.errors import RecipeError
from btx.graph.artifact import read_manifest
from tests.support.command import btx
from tests.support.instructions import items as instructions
from tests.support.policies import world_of
from tests.support.project import write_project

MANY = [
    "domains.math.expert={adapter: {method: dora, options: {r: 4}, learning_rate: 1e-2}}",
    "domains.code.expert=anchored",
]


TRAINED = ("adapter:math", "anchored-pair:code")


def graph_of(folder: Path, *said: str) -> Graph:
    """The graph of the recipe in a folder."""
    where = f"run.directory={folder / 'runs'}"
    return Graph(load_recipe(folder / "recipe.yaml", [*said, where]), folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    with opened(folder) as found:
        return {name: found.read(name).clone() for name in found.entries}


def test_the_plain_way_is_what_it_was_before_there_were_others(tmp_path: Path) -> None:
    write_project(tmp_path)
    plain = graph_of(tmp_path).steps
    for said in ("train", "{train: {}}", "{train: {trainable: all}}"):
        assert graph_of(tmp_path, f"domains.math.expert={said}").steps["train:math"].key == plain["train:math"].key
    own = graph_of(tmp_path, "domains.math.expert={train: {trainable: ffn}}").steps
    whole = graph_of(tmp_path, "train.trainable=ffn").steps
    assert own["train:math"].key == whole["train:math"].key != plain["train:math"].key
    assert own["train:code"].key == plain["train:code"].key


def test_a_trial_of_a_comparison_has_the_same_experts_under_its_own_labels(tmp_path: Path) -> None:
    write_project(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.yaml", [*MANY, f"run.directory={tmp_path / 'runs'}"])
    trial = Graph(recipe, tmp_path, variant="btx 5 0.1 #0")
    assert trial.labels("train") == ["adapter-merged:math", "anchored-expert:code"]
    trial.check(trial.needed(trial.labels("report")))


def test_a_mixture_of_experts_that_were_made_in_two_ways(tmp_path: Path) -> None:
    write_project(tmp_path)
    flags = [part for one in MANY for part in ("--set", one)]
    btx("run", "recipe.yaml", *flags, "--until", "merge", cwd=tmp_path)
    graph = graph_of(tmp_path, *MANY)
    assert graph.labels("train") == ["adapter-merged:math", "anchored-expert:code"]
    assert graph.labels("train", "code") == ["anchored-expert:code"]
    seed, math, code = (
        tensors(folder) for folder in
        (tmp_path / "seed", graph.steps["adapter-merged:math"].folder, graph.steps["anchored-expert:code"].folder)
    )  # fmt: skip
    assert seed.keys() == math.keys() == code.keys()
    moved = {name for name in seed if not torch.equal(seed[name], code[name])}
    assert moved
    assert all(".mlp." in name for name in moved)  # beside the frozen seed nothing else is trained
    adapted = {name for name in seed if not torch.equal(seed[name], math[name])}
    assert adapted == {name for name in seed if name.endswith("proj.weight")}
    made = {name: read_manifest(graph.steps[name].folder)["facts"]["tokens"] for name in TRAINED}
    assert made == dict.fromkeys(TRAINED, 3072)
    planned = {row.label: row.tokens for row in rows(graph.recipe, tmp_path)}
    assert {name: planned[name] for name in TRAINED} == made


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("expert=adaptor", "domains.math.expert: there is no way 'adaptor'; did you mean 'adapter'?"),
        ("expert={adapter: {methd: dora}}", "domains.math.expert.adapter: methd: there is no such key; did you mean"),
        ("expert={adapter: {tokens: 5}}", "domains.math.expert.adapter: tokens does not apply to one expert"),
        ("expert={train: {batch_tokens: 100}}", "batch_tokens (100) must be a multiple of sequence_length"),
        ("expert={train: {}, adapter: {}}", "`expert` names one way to make it"),
    ],
)
def test_what_cannot_be_made_so_is_refused(tmp_path: Path, said: str, why: str) -> None:
    write_project(tmp_path)
    with pytest.raises(RecipeError) as told:
        graph_of(tmp_path, f"domains.math.{said}")
    assert why in str(told.value)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("{options: {rank: 4}}", "domains.math.expert: adapter.options: LoraConfig has no 'rank'"),
        ("{sequence_length: 1024, batch_tokens: 1024}", "domains.math.expert: adapter.sequence_length is 1024"),
        ("{options: {target_modules: [q_prj, up_proj]}}",
         "domains.math.expert: adapter.options: no module of the model is called 'q_prj' (target_modules); "
         "did you mean 'q_proj'?"),
        ("{options: {target_modules: .*query}}", "no module of the model fits the pattern target_modules (.*query)"),
    ],
)  # fmt: skip
def test_what_the_making_of_an_expert_refuses_names_the_domain_before_anything_runs(
    tmp_path: Path, said: str, why: str
) -> None:
    write_project(tmp_path)
    graph = graph_of(tmp_path, f"domains.math.expert={{adapter: {said}}}")
    with pytest.raises(RecipeError) as told:
        graph.check(graph.needed(graph.labels("train")))
    assert why in str(told.value)
    alone = graph_of(tmp_path, f"adapter={said}")
    with pytest.raises(RecipeError) as told:
        alone.check(alone.needed(["adapter"]))
    assert why.removeprefix("domains.math.expert: ") in str(told.value)
    assert "domains" not in str(told.value)


def test_a_tied_head_is_a_module_that_an_adapter_may_name(tmp_path: Path) -> None:
    """Though no tensor of that name is stored."""
    graph = graph_of(write_project(tmp_path, family="qwen3").parent, "adapter={options: {target_modules: [lm_head]}}")
    graph.check(graph.needed(["adapter"]))


@pytest.mark.parametrize("how", ["adapter", "anchored"])
def test_one_of_several_experts_is_made_by_train_alone(tmp_path: Path, how: str) -> None:
    write_project(tmp_path)
    said: list[Any] = [f"domains.math.expert={how}", "domains.math.experts=2"]
    with pytest.raises(RecipeError, match=rf"domains.math.expert: {how} makes one expert of a domain"):
        graph_of(tmp_path, *said)


def test_instructions_and_rewards_make_experts_too(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    world = world_of(tmp_path)
    policy = {name: value for name, value in world.recipe.pop("grpo").items() if name != "steps"}
    (tmp_path / "data/instructions.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in instructions(60, seed=0))
    )
    each = policy["prompts"] * policy["generations"] * policy["sequence_length"]
    world.recipe["domains"] = {
        "math": {"data": ["data/math.jsonl"], "tokens": 2 * each, "expert": {"grpo": policy}},
        "law": {"data": ["data/law.jsonl"], "tokens": 64, "expert": {"sft": {"data": ["data/instructions.jsonl"]}}},
    }
    done = CliRunner().invoke(main, ["run", str(world.write()), "--until", "merge"])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    graph = main_graph(world.write(), ())
    assert graph.labels("train") == ["grpo:math", "sft:law"]
    assert json.loads((graph.steps["merge"].folder / "experts.json").read_text())["models"] == ["math", "law", "seed"]
    facts = read_manifest(graph.steps["grpo:math"].folder)["facts"]
    assert facts["steps"] == 2  # as many as its tokens suffice for
    world.set("domains.math.expert", {"grpo": {**policy, "steps": 3}})
    with pytest.raises(RecipeError, match=r"domains.math.expert.grpo: steps does not apply to one expert"):
        main_graph(world.write(), ())
