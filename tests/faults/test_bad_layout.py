"""`btx run` refuses an impossible expert layout before anything is written."""

from __future__ import annotations

import pytest

from btx.cli.main import graph_of
from btx.errors import ArtifactError, RecipeError
from btx.graph.artifact import lock, locked
from tests.support.world import Break, World, refused, setting

LAYOUTS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "layers of a family that has experts in all": (
        setting("merge.layers", "alternate"),
        ("merge.layers", "mixtral", "llama", "qwen3"),
    ),
    "a layer that is not there": (setting("merge.layers", [0, 1, 2]), ("merge.layers", "0 to 1")),
    "no layer": (setting("merge.layers", []), ("merge.layers", "empty")),
    "a shared expert in a family without": (
        setting("merge.shared_expert", "seed"),
        ("merge.shared_expert", "mixtral", "qwen2"),
    ),
    "copies of chunks": (
        lambda world: (world.set("merge.experts", "split"), world.set("merge.copies", 2)),
        ("merge:", "copies", "experts: per_model"),
    ),
    "copies of nobody": (setting("merge.copies", {"maths": 2}), ("merge.copies", "'maths'", "'math'")),
    "copies with one row": (
        lambda world: (world.set("merge.router", "activations"), world.set("merge.copies", 2)),
        ("merge:", "copies", "reinitialize"),
    ),
    "copies without end": (setting("merge.copies", 10**12), ("merge.copies", "1024")),
    "experts without end": (setting("domains.math.experts", 10**12), ("domains.math.experts", "1024")),
    "everything drawn anew": (setting("merge.reinitialize", 1), ("merge.reinitialize", "less than 1")),
    "no experts of a domain": (setting("domains.math.experts", 0), ("domains.math.experts",)),
    "several trained and some given": (setting("domains.law.experts", 2), ("domains.law", "list")),
    "a list of no checkpoints": (setting("domains.law.checkpoint", []), ("domains.law.checkpoint", "empty")),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_that_cannot_be_had_is_refused_with_its_place_and_the_remedy(world: World, case: str) -> None:
    spoil, words = LAYOUTS[case]
    spoil(world)
    refused(world.write(), world.runs, 2, words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("merge.copies", 0),
        ("merge.copies", {"seed": 0}),
        ("merge.layers", [-1]),
        ("domains.law.checkpoint", ["law", 7]),
    ],
)
def test_a_field_of_several_forms_is_named_as_the_recipe_has_it(world: World, key: str, value: object) -> None:
    world.set(key, value)
    said = refused(world.write(), world.runs, 2, (f"{key}:",))
    assert "function" not in said
    assert "list[" not in said


def test_several_experts_of_a_domain_wait_for_nobody_and_have_logs_of_their_own(world: World) -> None:
    world.set("domains.math.experts", 2)
    steps = graph_of(world.write(), ()).steps
    one, two = steps["train:math.0"], steps["train:math.1"]
    assert one.lock_file != two.lock_file
    assert one.log_file != two.log_file
    with lock(one.lock_file, waiting=lambda _owner: None):
        assert not locked(two.lock_file)


def test_text_that_is_too_little_for_several_experts_is_refused(world: World) -> None:
    world.set("domains.math.experts", 1000)
    refused(world.write(), world.runs, 2, ("tokens:math", "too little data", "for each training", "16001"))


@pytest.mark.parametrize(
    ("key", "value"), [("merge.layers", [0]), ("merge.shared_expert", "seed"), ("merge.experts", "ffn+attention")]
)
def test_no_expert_is_trained_for_a_merge_that_cannot_be_had(world: World, key: str, value: object) -> None:
    world.set(key, value)
    graph = graph_of(world.write(), ())
    with pytest.raises((RecipeError, ArtifactError), match=r"merge\.|attention experts"):
        graph.check(graph.needed(graph.labels("train", "math")))


def test_one_missing_of_several_checkpoints_is_named(world: World) -> None:
    world.set("domains.law.checkpoint", ["law", "lav"])
    refused(world.write(), world.runs, 3, ("domains.law.checkpoint", "no folder", "lav"))
