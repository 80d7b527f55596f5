"""A routing rule under gradient checkpointing: the same gradients, the same record."""

import pytest
import torch
from torch import Tensor

from btx.moe.balance import balance_loss
from btx.moe.hooks import Routed, find_routers
from btx.moe.routing import Routing
from tests.support.moe_models import IDS, RULES, build, forward, use_checkpointing


def gradients(
    rule: str, k: int, *, checkpointed: bool, form: str, soft_first_layer: bool, family: str
) -> tuple[dict[str, Tensor], list[Routing]]:
    """Gradients of the loss plus ten balance losses, after checking that backward left the record alone."""
    model = build(family, k=k).train()
    assert not checkpointed or use_checkpointing(model) == 3
    with Routed(model, rule, k, soft_first_layer=soft_first_layer) as routed:
        routed.step = 2000
        torch.manual_seed(42)
        loss = forward(model).loss
        layers = routed.layers
        (loss + 10 * balance_loss(form, layers)).backward()
        assert all(now is then for now, then in zip(routed.layers, layers, strict=True))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, layers


@pytest.mark.parametrize("form", ["btx", "switch", "transformers"])
@pytest.mark.parametrize("rule_k", RULES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_checkpointing_changes_no_gradient_and_no_record(family: str, rule_k: tuple[str, int], form: str) -> None:
    (plain, layers), (recomputed, again) = (
        gradients(*rule_k, checkpointed=c, form=form, soft_first_layer=False, family=family) for c in (False, True)
    )
    assert all(torch.equal(a, b) for x, y in zip(layers, again, strict=True) for a, b in zip(x, y, strict=True))
    assert plain.keys() == recomputed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_checkpointing_changes_no_gradient_with_a_soft_first_layer() -> None:
    (plain, _), (recomputed, _) = (
        gradients("sample_top1", 1, checkpointed=c, form="btx", soft_first_layer=True, family="mixtral")
        for c in (False, True)
    )
    torch.testing.assert_close(recomputed, plain)


def test_the_balance_loss_reaches_every_router_and_the_layers_below_it() -> None:
    model = build().train()
    use_checkpointing(model)
    with Routed(model, "top_k", 2) as routed:
        forward(model)
        balance_loss("btx", routed.layers).backward()
    assert all(float(router.weight.grad.abs().max()) > 1e-6 for router in find_routers(model).values())
    assert float(model.model.layers[1].mlp.experts.down_proj.grad.abs().max()) > 1e-6
    assert model.model.layers[2].mlp.experts.down_proj.grad is None  # it lies above the last router


def test_gradients_accumulate_over_passes_as_over_one_with_both() -> None:
    def accumulated(*, checkpointed: bool) -> list[Tensor]:
        model = build(k=1).train()
        if checkpointed:
            use_checkpointing(model)
        with Routed(model, "sample_top1", 1) as routed:
            torch.manual_seed(1)
            total = torch.zeros(())
            for ids in IDS:  # two forward passes before one backward pass
                total = total + forward(model, ids[None]).loss + balance_loss("btx", routed.layers)
            total.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(accumulated(checkpointed=True), accumulated(checkpointed=False))


def test_reentrant_checkpointing_is_refused_as_balance_losses_would_lose_their_gradient() -> None:
    model = build().train()
    use_checkpointing(model, reentrant=True)
    with Routed(model, "top_k", 2), pytest.raises(ValueError, match="'use_reentrant': False"):
        model(inputs_embeds=torch.randn(1, 5, 16, requires_grad=True), use_cache=False)
