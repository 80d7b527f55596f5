"""`btx plan` plans the model that the merge makes, and refuses a config that makes no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from btx.cli.main import graph_of, main
from btx.cli.plan import rows
from btx.conversions.registry import load_recipe
from tests.support.models import config_of, save_model
from tests.support.vocabularies import extended, plain
from tests.support.world import World, edit_json


def planned(world: World) -> int:
    """Parameters of the merged model as planned."""
    return next(r.parameters for r in rows(load_recipe(world.write(), []), world.root) if r.label == "merge")


def wider(world: World) -> None:
    save_model(world.law, config_of("llama", intermediate_size=80))


def with_tokens(world: World) -> None:
    for folder in (world.seed, world.law):
        plain(folder, "llama")
    extended(world.law, "llama", ["<x>", "<y>"], noise=0.01)
    extended(world.root / "law2", "llama", ["<y>", "<z>"], noise=0.02)
    world.set("domains.law.checkpoint", ["law", "law2"])


@pytest.mark.parametrize("change", [wider, with_tokens])
def test_experts_at_hand_are_counted_as_they_are(world: World, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btx.merge.lineage.LEAST_COSINE", -1.0)
    change(world)
    world.set("domains.math", {"checkpoint": "seed", "data": ["data/math.jsonl"]})
    graph = graph_of(world.write(), ())
    for step in graph.needed(["merge"]):
        step.build(lambda _event: None)
    made = load_file(graph.steps["merge"].folder / "model.safetensors")
    assert planned(world) == sum(tensor.numel() for tensor in made.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**15}, "more than a model has"),
        ({"hidden_size": 0}, "hidden_size"),
    ],
)
def test_a_config_that_makes_no_model_ends_in_a_sentence(world: World, changes: dict[str, Any], words: str) -> None:
    edit_json(world.seed / "config.json", **changes)
    done = CliRunner().invoke(main, ["plan", str(world.write())])
    assert isinstance(done.exception, SystemExit)
    assert done.output.startswith("btx: ")
    assert words in done.output


def test_fields_that_a_config_leaves_to_its_class_are_counted_as_the_class_has_them(world: World) -> None:
    whole: Path = world.write()
    wanted = [r.parameters for r in rows(load_recipe(whole, []), world.root)]
    edit_json(world.seed / "config.json", num_key_value_heads=4, head_dim=None)
    stated = [r.parameters for r in rows(load_recipe(whole, []), world.root)]
    edit_json(world.seed / "config.json", num_key_value_heads=None)
    assert [r.parameters for r in rows(load_recipe(whole, []), world.root)] == stated
    assert stated > wanted
