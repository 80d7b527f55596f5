"""The router z-loss, and balance by a bias on the choice: closed forms, the last tenth, resuming, what is exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from btx.models.families import MOE
from btx.models.model import published
from btx.moe.balance import z_loss
from btx.moe.bias import LoadBias
from btx.moe.dialects import BIAS
from btx.moe.hooks import Routed, find_routers
from btx.moe.routing import LayerStatistics, Routing, route
from btx.recipe.settings import FinetuneSettings
from tests.support.loops import WHERE, loop_of, stop_after, weights
from tests.support.moe_models import build, forward

NOTHING = torch.zeros(0, 2)
BY_BIAS = {"type": "bias", "weight": 0.05}


def layer_of(load: list[float]) -> LayerStatistics:
    """A layer with these loads."""
    return LayerStatistics(load=load, entropy=0.0, entropy_share=0.0, dead=[])


@pytest.mark.parametrize("value", [0.0, -2.0, 3.5])
def test_the_z_loss_of_equal_logits_is_the_square_of_their_log_sum(value: float) -> None:
    layers = [Routing(torch.full((5, 4), value), NOTHING, NOTHING), Routing(torch.zeros(5, 4), NOTHING, NOTHING)]
    wanted = (value + math.log(4)) ** 2 + math.log(4) ** 2
    assert float(z_loss(layers)) == pytest.approx(wanted, rel=1e-6)


def test_the_z_loss_pulls_logits_together_and_down() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    z_loss([Routing(logits, NOTHING, NOTHING)]).backward()
    whole = torch.logsumexp(logits.detach(), -1)
    torch.testing.assert_close(logits.grad, 2 * whole * logits.detach().softmax(-1))


def test_a_bias_changes_the_choice_and_no_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    index, weight = route(logits, "top_k", 2, bias_E=torch.tensor([0.0, -1.0, 0.0, 0.0]), training=True)
    assert index.tolist() == [[0, 2]]
    torch.testing.assert_close(weight, logits[:, [0, 2]].softmax(-1))
    plain = route(logits, "top_k", 2, training=True)
    none = route(logits, "top_k", 2, bias_E=torch.zeros(4), training=True)
    assert torch.equal(plain[0], none[0])
    torch.testing.assert_close(plain[1], none[1])
    index, weight = route(logits, "switch", 1, bias_E=torch.tensor([-1.0, 0.0, 0.0, 0.0]), training=True)
    assert (index.item(), weight.item()) == (1, 1.0)


def test_it_moves_by_the_rate_against_the_load_and_is_off_for_the_last_tenth() -> None:
    model = build().train()
    with Routed(model, "top_k", 2) as routed:
        bias = LoadBias(routed, rate=0.01, steps=20)
        loads = [layer_of([0.25, 0.5, 0.125, 0.125])] * 3
        for step in range(17):
            bias.begin(step)
            bias.update(step, loads)
        for dialect in routed.dialects:
            torch.testing.assert_close(dialect.bias_E, 17 * 0.01 * torch.tensor([0.0, -1.0, 1.0, 1.0]))
        assert bias.largest == pytest.approx(0.17)
        for step in (17, 18, 19):
            bias.begin(step)
            bias.update(step, loads)
            assert (bias.largest == 0.0) == (step >= 18)


def test_a_collapsed_router_spreads_in_training_and_routes_as_before_in_evaluation() -> None:
    model = build().train()
    with torch.no_grad():
        for router in find_routers(model).values():
            router.weight[0] = 4 * router.weight.abs().sum(0)  # the first expert has by far the largest logits
    stock = forward(model.eval()).logits
    model.train()
    with Routed(model, "top_k", 2) as routed:
        bias = LoadBias(routed, rate=0.2, steps=100)
        for dialect in routed.dialects:
            dialect.bias_E.copy_(torch.tensor([-5.0, 0.0, 0.0, 0.0]))
        forward(model)
        assert all((layer.index_TK != 0).all() for layer in routed.layers)
        assert bias.largest == 5.0
        assert torch.equal(forward(model.eval()).logits, stock)


def test_what_has_no_place_for_it_exports_nothing_of_it_and_what_has_one_exports_it() -> None:
    for family, kept in (("mixtral", False), ("ernie4_5_moe", True)):
        model = build(family).train()
        with Routed(model, "top_k", 2) as routed:
            bias = LoadBias(routed, rate=0.5, steps=10)
            for step in range(10):
                bias.begin(step)
                bias.update(step, [layer_of([0.4, 0.4, 0.1, 0.1])] * 3)
        state = model.state_dict()
        named = published(MOE[family], state)
        assert not any(name.endswith(BIAS) for name in named)
        if kept:
            found = named["model.layers.0.mlp.moe_statics.e_score_correction_bias"]
            torch.testing.assert_close(found, 5.0 * torch.tensor([[-1.0, -1.0, 1.0, 1.0]]))
        else:
            assert any(name.endswith(BIAS) for name in state)


@pytest.mark.parametrize("cut", [None, 2])
def test_a_training_with_it_is_the_same_however_a_step_is_cut_and_resumes_to_the_same_bits(
    tmp_path: Path, cut: int | None
) -> None:
    more: dict[str, Any] = {"balance": {**BY_BIAS, "z": 0.01}}
    whole = loop_of("top_k", tmp_path, "a", **more)
    whole.run()
    assert any(name.endswith(BIAS) for name in weights(whole))
    if cut:
        parts = loop_of("top_k", tmp_path, "b", where=WHERE.model_copy(update={"micro_batch": cut}), **more)
        parts.run()
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(parts)[name], tensor, atol=2e-5, rtol=0)
        return
    often = WHERE.model_copy(update={"checkpoint_steps": 2})
    stop_after(loop_of("top_k", tmp_path, "b", where=often, **more), 5)
    resumed = loop_of("top_k", tmp_path, "b", where=often, **more)
    assert resumed.run().resumed_from == 4
    assert all(torch.equal(t, weights(resumed)[n]) for n, t in weights(whole).items())
    plain = loop_of("top_k", tmp_path, "c")
    plain.run()
    assert any(not torch.equal(t, weights(whole)[n]) for n, t in weights(plain).items())


def test_a_rule_without_a_choice_has_no_bias() -> None:
    with pytest.raises(ValidationError, match="sample_top1 has none"):
        FinetuneSettings(sequence_length=8, batch_tokens=8, routing="sample_top1", balance=BY_BIAS)


def test_an_exported_bias_chooses_in_the_stock_class() -> None:
    """ERNIE 4.5's own: an expert whose bias is far below the others' is chosen no more, by any token."""
    model = build("ernie4_5_moe").eval()
    with torch.no_grad():
        for router in find_routers(model).values():
            router.moe_statics.e_score_correction_bias.copy_(torch.tensor([[-9.0, 0.0, 0.0, 0.0]]))
    with Routed(model, "top_k", 2) as routed:
        forward(model)
    assert all((layer.index_TK != 0).all() for layer in routed.layers)
