"""The load-balancing losses: closed forms, gradients and conventions."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from btx.moe.balance import FORMS, balance_loss, over_processes
from btx.moe.routing import Routing, route
from tests.support.routing_cases import logits, routing, spread

LOSSES = tuple(form for form in FORMS if form != "none")


@pytest.mark.parametrize(("over", "k"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2)])
def test_losses_have_their_closed_forms_from_balanced_to_collapsed(over: int, k: int) -> None:
    layers = [spread(64, 8, over, k)] * 3
    assert float(balance_loss("btx", layers)) == pytest.approx(3 * 8 / over, rel=1e-12)
    assert float(balance_loss("switch", layers)) == pytest.approx(8 / over, rel=1e-12)
    assert float(balance_loss("transformers", layers)) == pytest.approx(k * 8 / over, rel=1e-12)
    assert float(balance_loss("none", layers)) == 0.0


def test_btx_is_the_papers_sum_written_out() -> None:
    layers = [routing(logits(9, 4, seed=s)) for s in (1, 2)]
    want = 0.0
    for logits_TE, index_TK, weight_TK in layers:
        for expert in range(4):
            u = sum(float(weight_TK[t, j]) for t in range(9) for j in range(2) if index_TK[t, j] == expert) / 9
            want += 4 * u * float(logits_TE.softmax(-1)[:, expert].sum()) / 9
    assert float(balance_loss("btx", layers)) == pytest.approx(want, rel=1e-12)


def test_switch_is_the_published_sum_written_out() -> None:
    layers = [routing(logits(9, 4, seed=s)) for s in (1, 2)]
    want = 0.0
    for logits_TE, index_TK, _ in layers:
        for expert in range(4):
            share = sum(int(chosen == expert) for chosen in index_TK.flatten()) / 18
            want += 4 * share * float(logits_TE.softmax(-1)[:, expert].sum()) / 9 / 2
    assert float(balance_loss("switch", layers)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("form", LOSSES)
def test_losses_have_the_gradient_of_finite_differences(form: str) -> None:
    def loss(first: Tensor, second: Tensor) -> Tensor:
        return balance_loss(form, [routing(first), routing(second)])

    inputs = [logits(6, 4, seed=s).requires_grad_() for s in (1, 2)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_only_btx_has_a_gradient_through_the_gate_weights() -> None:
    logits_TE = logits(20, 4)
    index_TK, weight_TK = route(logits_TE, "top_k", 2)
    weight_TK.requires_grad_()
    (grad_TK,) = torch.autograd.grad(balance_loss("btx", [Routing(logits_TE, index_TK, weight_TK)]), weight_TK)
    want = 4 * logits_TE.softmax(-1).mean(0)[index_TK] / 20
    torch.testing.assert_close(grad_TK, want)
    for form in ("switch", "transformers", "none"):
        assert not balance_loss(form, [Routing(logits_TE, index_TK, weight_TK)]).requires_grad


def test_pooling_calls_layers_balanced_that_collapsed_onto_different_experts() -> None:
    layers = [spread(16, 4, 1, 1)._replace(index_TK=torch.full((16, 1), e)) for e in range(4)]
    layers = [layer._replace(logits_TE=layer.logits_TE.roll(e, 1)) for e, layer in enumerate(layers)]
    assert float(balance_loss("transformers", layers)) == pytest.approx(1.0)  # the trap
    assert float(balance_loss("switch", layers)) == pytest.approx(4.0)
    assert float(balance_loss("btx", layers)) == pytest.approx(16.0)


def test_no_loss_adds_nothing_to_a_loss_that_is_differentiated() -> None:
    parameter = torch.tensor(3.0, requires_grad=True)
    (parameter**2 + 0.01 * balance_loss("none", [routing(logits(3, 4))])).backward()
    assert parameter.grad is not None
    assert float(parameter.grad) == 6.0


@pytest.mark.parametrize("form", LOSSES)
def test_over_processes_it_has_the_value_and_mean_gradient_of_all_tokens(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [[logits(6, 4, seed=s + 10 * rank).requires_grad_() for s in (1, 2)] for rank in (0, 1)]
    whole = balance_loss(form, [routing(torch.cat(pair)) for pair in zip(*parts, strict=True)])
    wanted = torch.autograd.grad(whole, [x for part in parts for x in part])
    said: list[list[Tensor]] = [[], []]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in (0, 1):  # what each rank contributes
        monkeypatch.setattr(dist, "all_reduce", lambda mean, rank=rank: said[rank].append(mean.clone()))
        balance_loss(form, [routing(x) for x in parts[rank]], over_processes)
    found: list[Tensor] = []
    for rank in (0, 1):
        other = iter(said[1 - rank])
        monkeypatch.setattr(dist, "all_reduce", lambda mean, other=other: mean.add_(next(other)))
        loss = balance_loss(form, [routing(x) for x in parts[rank]], over_processes)
        torch.testing.assert_close(loss, whole)
        found += [g / 2 for g in torch.autograd.grad(loss, parts[rank])]
    torch.testing.assert_close(tuple(found), wanted)


def test_unknown_forms_and_absent_layers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown balance loss 'megatron'; known: btx, switch, transformers, none"):
        balance_loss("megatron", [routing(logits(3, 4))])
    with pytest.raises(ValueError, match="at least one MoE layer"):
        balance_loss("btx", [])
