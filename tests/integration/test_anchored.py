"""Anchored experts: the seed keeps every bit, each expert is learned beside it, and nothing is averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.conversions.anchored import ROWS
from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.models.families import DENSE
from btx.models.family import DOWN, GATE, UP
from btx.models.opened import Stock, opened_checkpoint
from btx.recipe.settings import RoutingRule, RunSettings
from tests.support.project import write_project

BLOCKS = (GATE, UP, DOWN)


@pytest.fixture(scope="module", params=["llama", "qwen2", "olmo2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The steps of an anchored conversion of a family, all published, with the seed's tensors."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write_project(folder, family=request.param)
    sets = [
        "anchored={sample: 0.25}",
        f"run.directory={folder}/runs",
        "train.learning_rate=1e-2",
    ]
    graph = Graph(load_recipe(recipe, sets), folder)
    for step in graph.needed(["anchored"]):
        step.build(lambda _event: None)
    return {"seed": load_file(folder / "seed/model.safetensors"), "family": DENSE[request.param], **graph.steps}


def tensors(step: Any) -> dict[str, torch.Tensor]:
    """What a step published."""
    found: dict[str, torch.Tensor] = load_file(step.folder / "model.safetensors")
    return found


def block(family: Any, tensor: str, expert: int) -> str:
    """The name in a mixture of a dense feed-forward tensor's copy."""
    kind = next(kind for kind in BLOCKS if tensor.endswith(kind))
    return f"{tensor.removesuffix(kind)}{family.expert[kind].format(e=expert)}"


def test_the_seed_keeps_every_bit_beside_an_expert_that_learns(made: dict[str, Any]) -> None:
    pair, family = tensors(made["anchored-pair:math"]), made["family"]
    for name, tensor in made["seed"].items():
        if name.endswith(BLOCKS):
            assert torch.equal(pair[block(family, name, 0)], tensor), name
            assert not torch.equal(pair[block(family, name, 1)], tensor), name
        else:
            assert torch.equal(pair[name], tensor), name
    for layer in range(2):
        rows = pair[family.router_name(layer)]
        assert not rows[0].any()
        assert rows[1].any()


def test_an_expert_alone_is_the_seed_with_other_blocks(made: dict[str, Any]) -> None:
    alone, pair = tensors(made["anchored-expert:code"]), tensors(made["anchored-pair:code"])
    assert alone.keys() == made["seed"].keys()
    for name, tensor in made["seed"].items():
        wanted = pair[block(made["family"], name, 1)] if name.endswith(BLOCKS) else tensor
        assert torch.equal(alone[name], wanted), name


def test_the_mixture_is_the_seed_with_all_experts_and_their_rows_beside_it(made: dict[str, Any]) -> None:
    merged, family = tensors(made["anchored-merge"]), made["family"]
    experts = [tensors(made[f"anchored-expert:{name}"]) for name in ("math", "code")]
    for name, tensor in made["seed"].items():
        if name.endswith(BLOCKS):
            for n, model in enumerate([*experts, made["seed"]]):
                assert torch.equal(merged[block(family, name, n)], model[name]), name
        else:
            assert torch.equal(merged[name], tensor), name
    rows = [load_file(made[f"anchored-expert:{name}"].folder / ROWS) for name in ("math", "code")]
    for layer in range(2):
        found = merged[family.router_name(layer)]
        assert torch.equal(found, torch.stack([rows[0][str(layer)], rows[1][str(layer)], torch.zeros_like(found[0])]))


def test_the_sample_trains_the_routers_alone(made: dict[str, Any]) -> None:
    before, after = tensors(made["anchored-merge"]), tensors(made["anchored"])
    routers = {made["family"].router_name(layer) for layer in range(2)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == routers


def test_routed_to_one_expert_alone_the_mixture_is_that_expert(made: dict[str, Any]) -> None:
    """One-hot routing: every other expert left out in turn until one remains."""
    where, rule = (
        RunSettings(device="cpu", threads=1),
        RoutingRule(routing="top_k", experts_per_token=1, soft_first_layer=False),
    )
    ids = torch.arange(1, 40)[None]
    for number, name in enumerate(("math", "code")):
        with (
            opened_checkpoint(made["anchored-merge"].folder, where=where, rule=rule) as mixture,
            opened_checkpoint(made[f"anchored-expert:{name}"].folder, where=where) as alone,
        ):
            assert isinstance(mixture, Stock)
            for module in mixture.net.modules():
                if type(module).__name__.endswith("TopKRouter"):
                    module.register_forward_hook(
                        lambda _m, _a, out, e=number: (out[0], torch.ones_like(out[1]), torch.full_like(out[2], e))
                    )
            assert torch.allclose(mixture.log_probs(ids), alone.log_probs(ids), atol=1e-4)
