"""A routing rule on native transformers models: what it replaces and what it records."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from btx.moe.balance import balance_loss
from btx.moe.hooks import Routed, find_routers
from btx.moe.routing import Routing, route
from tests.support.moe_models import FAMILIES, IDS, RULES, SHAPE, E, build, forward, hooks

# --- what is replaced --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_training_under_top_k_is_stock_training_bit_for_bit(family: str) -> None:
    model = build(family).train()
    stock = forward(model).logits
    with Routed(model, "top_k", 2):
        found = forward(model).logits
    if family in ("granitemoe_swa", "cohere2_moe", "ernie4_5_moe", "lfm2_moe"):  # softmax of the chosen alone, clamps
        torch.testing.assert_close(found, stock, atol=2e-5, rtol=0)
    else:
        assert torch.equal(found, stock)


@pytest.mark.parametrize("rule_k", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_stock_evaluation_under_every_rule(family: str, rule_k: tuple[str, int]) -> None:
    model = build(family, k=rule_k[1]).eval()
    stock = forward(model).logits
    with Routed(model, *rule_k):
        assert torch.equal(forward(model).logits, stock)


def router_gradient(family: str, rule: str | None) -> tuple[Tensor, float]:
    """Training logits of a top-1 model, stock or under `rule`, and its first router's largest gradient."""
    model = build(family, k=1).train()
    if rule is not None:
        Routed(model, rule, 1)
    out = forward(model)
    (grad_ED,) = torch.autograd.grad(out.loss, next(iter(find_routers(model).values())).weight)
    return out.logits, float(grad_ED.abs().max())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_switch_computes_what_stock_top_1_does_and_trains_the_router_which_that_does_not(family: str) -> None:
    (stock, silent), (ours, heard) = (router_gradient(family, rule) for rule in (None, "switch"))
    assert torch.equal(ours, stock)
    assert silent < 1e-6 < 1e-4 < heard


def test_one_experts_weight_is_lost_in_flex_olmos_norm_after_the_block() -> None:
    """Why top-1 rules do not suit FlexOlmo: it normalises the block's output, which loses the scale."""
    stock, _ = router_gradient("flex_olmo", None)
    ours, heard = router_gradient("flex_olmo", "switch")
    assert torch.equal(ours, stock)
    assert heard < 1e-5


@pytest.mark.parametrize(("rule", "k"), [("switch", 1), ("soft", E), ("sample_top1", 1)])
def test_training_computes_with_the_rules_experts_and_weights(rule: str, k: int) -> None:
    model = build(k=k).train()
    block = model.model.layers[0].mlp
    x_BSD = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(3))
    logits_TE = x_BSD[0] @ block.gate.weight.T
    with Routed(model, rule, k) as routed:
        routed.step = 4000
        torch.manual_seed(11)
        got = block(x_BSD)
    torch.manual_seed(11)
    index_TK, weight_TK = route(logits_TE, rule, k, step=4000, training=True)
    torch.testing.assert_close(got[0], block.experts(x_BSD[0], index_TK, weight_TK))


@pytest.mark.parametrize("training", [True, False])
def test_a_soft_first_layer_is_soft_in_both_modes_and_the_others_are_not(training: bool) -> None:
    model = build(k=1).train(training)
    with Routed(model, "sample_top1", 1, soft_first_layer=True) as routed:
        forward(model)
        first, *others = routed.layers
        x_BSD = torch.randn(1, 7, 16)
        block = model.model.layers[0].mlp
        got = block(x_BSD)
    assert first.index_TK.shape == (18, E)
    assert [layer.index_TK.shape for layer in others] == [(18, 1)] * 2
    torch.testing.assert_close(first.weight_TK, first.logits_TE.softmax(-1))
    whole = route(x_BSD[0] @ block.gate.weight.T, "soft", E)
    torch.testing.assert_close(got[0], block.experts(x_BSD[0], *whole))


@pytest.mark.parametrize("rule_k", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_keep_the_dtype_of_the_stock_router(family: str, rule_k: tuple[str, int]) -> None:
    model = build(family, k=rule_k[1]).bfloat16().train()
    router = next(iter(find_routers(model).values()))
    x_TD = torch.randn(5, 16, dtype=torch.bfloat16)
    stock = router(x_TD)
    with Routed(model, *rule_k) as routed:
        ours = router(x_TD)
        forward(model)
        assert [layer.weight_TK.dtype for layer in routed.layers] == [torch.float32] * 3
    assert [t.dtype for t in ours] == [t.dtype for t in stock]
    assert torch.equal(ours[0], stock[0])


@pytest.mark.parametrize("rule_k", RULES)
def test_copies_of_one_expert_are_one_expert_whatever_is_chosen(rule_k: tuple[str, int]) -> None:
    model = build(k=rule_k[1]).train()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.copy_(weight[:1].expand_as(weight).clone())
    routers = list(find_routers(model).values())
    with Routed(model, *rule_k):
        first = forward(model).logits
        with torch.no_grad():
            for router in routers:
                router.weight.neg_()
        second = forward(model).logits
    if rule_k[0] == "sample_top1":  # in training its weight is a soft value below 1, as published
        assert not torch.allclose(first, second, atol=1e-3)
    else:
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


# --- what is recorded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rule_k", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_the_rule_on_the_logits_that_the_model_reports(
    family: str, rule_k: tuple[str, int], training: bool
) -> None:
    model = build(family, k=rule_k[1]).train(training)
    with Routed(model, *rule_k) as routed:
        torch.manual_seed(3)
        out = forward(model, output_router_logits=True)
        layers = routed.layers
    torch.manual_seed(3)
    assert len(layers) == len(out.router_logits) == 3
    for layer, reported in zip(layers, out.router_logits, strict=True):
        if family == "gemma4_moe":  # reports probabilities
            torch.testing.assert_close(layer.logits_TE.softmax(-1), reported)
            reported = layer.logits_TE
        reported = torch.nn.functional.logsigmoid(reported) if family == "lfm2_moe" else reported
        assert torch.equal(layer.logits_TE, reported)
        index_TK, weight_TK = route(reported, *rule_k, training=training)
        order = index_TK.argsort(-1), layer.index_TK.argsort(-1)  # stock soft routing sorts its experts
        assert torch.equal(index_TK.gather(1, order[0]), layer.index_TK.gather(1, order[1]))
        near = {"atol": 1e-5, "rtol": 0} if family == "lfm2_moe" else {}  # which adds 1e-6 to a sum
        torch.testing.assert_close(weight_TK.gather(1, order[0]), layer.weight_TK.gather(1, order[1]), **near)


@pytest.mark.parametrize("rule_k", RULES)
def test_a_balance_loss_of_the_record_has_the_gradient_of_one_made_anew(rule_k: tuple[str, int]) -> None:
    model = build(k=rule_k[1]).train()
    with Routed(model, *rule_k) as routed:
        torch.manual_seed(3)
        reported = forward(model, output_router_logits=True).router_logits
        recorded = balance_loss("btx", routed.layers)
    torch.manual_seed(3)
    anew = balance_loss("btx", [Routing(x, *route(x, *rule_k, training=True)) for x in reported])
    weights = [router.weight for router in find_routers(model).values()]
    grads = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (recorded, anew)]
    torch.testing.assert_close(*grads)
    assert all(float(grad.abs().max()) > 1e-6 for grad in grads[0])


def test_layers_are_in_order_beyond_ten() -> None:
    model = build(num_hidden_layers=12)
    assert list(find_routers(model)) == [f"model.layers.{layer}.mlp.gate" for layer in range(12)]
    with Routed(model, "top_k", 2) as routed:
        reported = forward(model, output_router_logits=True).router_logits
        assert all(torch.equal(a.logits_TE, b) for a, b in zip(routed.layers, reported, strict=True))


def test_only_sparse_layers_are_recorded() -> None:
    model = build("qwen3_moe", mlp_only_layers=[1])
    with Routed(model, "top_k", 2) as routed:
        forward(model)
        assert routed.names == ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]
        assert len(routed.layers) == 2


def test_a_record_is_of_the_last_forward_pass_alone() -> None:
    model = build().train()
    with Routed(model, "top_k", 2) as routed:
        with pytest.raises(ValueError, match="0 of 3 routers have a record"):
            _ = routed.layers
        forward(model)
        forward(model, IDS[:, :4])
        assert [len(layer.logits_TE) for layer in routed.layers] == [8, 8, 8]
        routed.clear()
        with pytest.raises(ValueError, match="0 of 3"):
            _ = routed.layers


def test_a_forward_pass_that_fails_leaves_no_record_and_does_not_keep_recording() -> None:
    model = build().train()
    with Routed(model, "top_k", 2) as routed:
        forward(model)
        handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(model)
        handle.remove()
        model.model.layers[2].mlp(torch.randn(1, 5, 16))
        with pytest.raises(ValueError, match="2 of 3"):
            _ = routed.layers
        forward(model)
        assert len(routed.layers) == 3


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_transformers_form_is_the_librarys_function(k: int) -> None:
    model = build(k=k).train()
    with Routed(model, "top_k", k) as routed:
        out = forward(model, output_router_logits=True)
        ours = balance_loss("transformers", routed.layers)
    torch.testing.assert_close(ours, load_balancing_loss_func(out.router_logits, E, k))
    torch.testing.assert_close(ours, out.aux_loss)
    weights = [router.weight for router in find_routers(model).values()]
    grads = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (ours, out.aux_loss)]
    torch.testing.assert_close(*grads)
    assert all(float(grad.abs().max()) > 0 for grad in grads[0])


# --- installing and removing -------------------------------------------------------------------------------


def test_removal_takes_every_hook_away_and_the_stock_model_is_back() -> None:
    model = build(k=1).train()
    stock, before = forward(model).logits, hooks(model)
    with Routed(model, "sample_top1", 1) as routed:
        assert hooks(model) == before + 5  # one a router, and two that open and close the record
        assert not torch.equal(forward(model).logits, stock)
    assert hooks(model) == before
    assert torch.equal(forward(model).logits, stock)
    routed.remove()
    assert hooks(model) == before


def test_a_dense_model_is_refused_by_its_class() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no router.*dense model cannot be routed"):
        Routed(LlamaForCausalLM(LlamaConfig(**SHAPE)), "top_k", 2)


def test_a_stock_router_that_would_do_something_else_after_training_is_refused() -> None:
    cases: list[tuple[Any, str, int, str]] = [
        (
            build(k=2),
            "switch",
            1,
            r"layers\.0\.mlp\.gate chooses 2 experts, not 1: set num_experts_per_tok = 1",
        ),
        (build(k=2), "top_k", 1, "chooses 2 experts, not 1"),
        (build(k=2), "top_k", 5, "k = 1 to 4, not 5"),
        (build("qwen3_moe", norm_topk_prob=False, k=1), "switch", 1, "set norm_topk_prob = True"),
        (build(), "best", 2, "unknown routing rule 'best'"),
    ]
    for model, rule, k, message in cases:
        before = hooks(model)
        with pytest.raises(ValueError, match=message):
            Routed(model, rule, k)
        assert hooks(model) == before
