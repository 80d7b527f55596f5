"""Several experts per domain, several copies per model: their names and how they count."""

from __future__ import annotations

from typing import Any

import pytest

from btx.recipe.mixing import mix
from btx.recipe.recipe import Recipe
from tests.support.project import SMALL
from tests.support.world import World


def test_several_experts_of_a_domain_are_numbered_and_weighed_together() -> None:
    many = {
        "a": {"data": ["a"], "tokens": 5, "experts": 2},
        "b": {"checkpoint": ["x", "y", "z"]},
        "c": {"checkpoint": "x"},
    }
    recipe = Recipe.model_validate({**SMALL, "domains": many})
    assert recipe.domain_of == {"a.0": "a", "a.1": "a", "b.0": "b", "b.1": "b", "b.2": "b", "c": "c"}
    assert recipe.models == [*recipe.domain_of, "seed"]
    assert mix(recipe, ["a", "b"]) == {"a": 10.0, "b": 10.0}


def test_copies_count_as_experts() -> None:
    more = {"merge": {"copies": {"a": 2, "seed": 3}}, "finetune": {"top_k": 5}}
    recipe = Recipe.model_validate({**SMALL, **more})
    assert list(recipe.merge.owners(recipe.models)) == ["a.0", "a.1", "seed.0", "seed.1", "seed.2"]
    with pytest.raises(ValueError, match="makes 5 experts"):
        Recipe.model_validate({**SMALL, **more, "finetune": {"top_k": 6}})


@pytest.mark.parametrize(
    ("domains", "merge"),
    [
        ({"a.0": {"checkpoint": "x"}, "a": {"checkpoint": ["x", "y"]}}, {}),
        ({"a.0": {"checkpoint": "x"}, "a": {"checkpoint": "x"}}, {"copies": {"a": 2}}),
        ({"seed.1": {"checkpoint": "x"}}, {"copies": {"seed": 2}}),
    ],
)
def test_two_experts_of_one_name_are_refused(domains: Any, merge: Any) -> None:
    with pytest.raises(ValueError, match=r"would be called '(a|seed)\.[01]'"):
        Recipe.model_validate({**SMALL, "domains": domains, "merge": merge})


def test_an_expert_that_joins_has_none_trained_again(world: World) -> None:
    labels = ("branch", "train:math", "merge")
    before = {label: world.key(label) for label in labels}
    world.set("domains.more", {"checkpoint": ["law", "law"]})
    assert [label for label in labels if world.key(label) != before[label]] == ["merge"]
