"""The routing rules as functions of tensors alone."""

import math

import pytest
import torch

from btx.moe.routing import (
    RULES,
    experts_per_token,
    route,
    temperature,
)
from tests.support.routing_cases import logits, rule_k, seeded


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_distinct_experts_and_weights_of_one_shape(rule: str, experts: int, tokens: int) -> None:
    k = rule_k(rule, experts)
    index_TK, weight_TK = route(logits(tokens, experts), rule, k, generator=seeded(), training=True)
    assert index_TK.shape == weight_TK.shape == (tokens, k)
    assert index_TK.dtype == torch.int64
    assert all(len(set(row)) == k and set(row) <= set(range(experts)) for row in index_TK.tolist())
    assert bool(((weight_TK > 0) & (weight_TK <= 1 + 1e-12)).all())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_softmax_over_the_k_largest_and_also_softmax_top_k_renormalise(k: int) -> None:
    logits_TE = logits(50, 5)
    index_TK, weight_TK = route(logits_TE, "top_k", k)
    largest = logits_TE.topk(k)
    torch.testing.assert_close(index_TK, largest.indices)
    torch.testing.assert_close(weight_TK, largest.values.softmax(-1))
    chosen = logits_TE.softmax(-1).gather(1, index_TK)
    torch.testing.assert_close(weight_TK, chosen / chosen.sum(-1, keepdim=True))


@pytest.mark.parametrize("rule", ["top_k", "soft"])
def test_gate_weights_have_the_gradient_of_finite_differences(rule: str) -> None:
    logits_TE = logits(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: route(x, rule, rule_k(rule, 4))[1], logits_TE)


def test_a_gumbel_sample_has_the_gradient_of_finite_differences_when_the_noise_is_held() -> None:
    logits_TE = logits(6, 4).requires_grad_()
    sample = lambda x: route(x, "sample_top1", 1, step=3000, generator=seeded(), training=True)[1]  # noqa: E731
    assert torch.autograd.gradcheck(sample, logits_TE)


def test_switch_weighs_exactly_one_and_passes_the_gradient_of_the_log_probability() -> None:
    logits_TE = logits(40, 4, dtype=torch.float32).requires_grad_()
    index_T1, weight_T1 = route(logits_TE, "switch", 1)
    assert bool((weight_T1 == 1.0).all())
    (got,) = torch.autograd.grad(weight_T1.sum(), logits_TE)
    (want,) = torch.autograd.grad(logits_TE.log_softmax(-1).gather(1, index_T1).sum(), logits_TE)
    torch.testing.assert_close(got, want)
    assert bool((want.abs().sum(-1) > 0).all())


def test_soft_is_top_k_over_all_experts_in_another_order() -> None:
    logits_TE = logits(30, 5)
    index_TE, weight_TE = route(logits_TE, "soft", 5)
    sorted_index, sorted_weight = route(logits_TE, "top_k", 5)
    assert index_TE.tolist() == [[0, 1, 2, 3, 4]] * 30
    torch.testing.assert_close(weight_TE.gather(1, sorted_index), sorted_weight)


@pytest.mark.parametrize("step", [0, 10**6])
def test_sample_top1_draws_each_expert_as_often_as_its_probability_at_any_temperature(step: int) -> None:
    logits_E = torch.tensor([1.0, 0.0, -1.0, 0.5])
    index_T1, weight_T1 = route(
        logits_E.expand(100_000, 4), "sample_top1", 1, step=step, generator=seeded(), training=True
    )
    share = torch.bincount(index_T1.flatten(), minlength=4) / 100_000
    torch.testing.assert_close(share, logits_E.softmax(-1), atol=0.006, rtol=0)  # four standard errors
    assert bool((weight_T1 >= 0.25).all())  # the largest of four shares
    assert float(weight_T1.std()) > 0.1


def test_sample_top1_weighs_its_choice_by_the_softmax_of_noisy_logits_over_the_temperature() -> None:
    logits_TE = logits(20, 4)
    index_T1, weight_T1 = route(logits_TE, "sample_top1", 1, step=3000, generator=seeded(7), training=True)
    exponential = torch.empty_like(logits_TE).exponential_(generator=seeded(7))
    soft_TE = ((logits_TE - exponential.log()) / math.exp(-0.3)).softmax(-1)
    torch.testing.assert_close(weight_T1, soft_TE.amax(-1, keepdim=True))
    assert index_T1.flatten().tolist() == soft_TE.argmax(-1).tolist()


def test_sample_top1_in_evaluation_is_the_arg_max_with_weight_one_and_draws_nothing() -> None:
    logits_TE = logits(20, 4, dtype=torch.float32)
    before = torch.get_rng_state()
    index_T1, weight_T1 = route(logits_TE, "sample_top1", 1, step=5)
    assert torch.equal(before, torch.get_rng_state())
    assert index_T1.flatten().tolist() == logits_TE.argmax(-1).tolist()
    assert bool((weight_T1 == 1.0).all())


def test_sample_top1_repeats_with_the_generator_and_follows_the_global_state_without_one() -> None:
    logits_TE = logits(50, 4)
    first, again, other = (route(logits_TE, "sample_top1", 1, generator=seeded(s), training=True)[1] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(first, route(logits_TE, "sample_top1", 1, training=True)[1])


def test_the_temperature_falls_from_one_to_a_half_at_the_papers_rate() -> None:
    assert temperature(0) == 1.0
    assert temperature(1000) == pytest.approx(math.exp(-0.1), abs=1e-15)
    assert temperature(6931) > 0.5 == temperature(6932) == temperature(10**9)


@pytest.mark.parametrize("rule", RULES)
def test_weights_of_low_precision_logits_are_computed_in_float32(rule: str) -> None:
    low = logits(30, 4, dtype=torch.float32).bfloat16()
    options = {"k": rule_k(rule, 4), "training": True}
    index, weight = route(low, rule, generator=seeded(), **options)  # type: ignore[arg-type]
    same_index, same_weight = route(low.float(), rule, generator=seeded(), **options)  # type: ignore[arg-type]
    assert weight.dtype == torch.float32
    assert torch.equal(index, same_index)
    assert torch.equal(weight, same_weight)


@pytest.mark.parametrize(
    ("rule", "k", "message"),
    [
        ("topk", 2, "unknown routing rule 'topk'; known: top_k, switch, soft, sample_top1"),
        ("top_k", 0, "k = 1 to 4, not 0"),
        ("top_k", 5, "k = 1 to 4, not 5"),
        ("switch", 2, "k = 1, not 2"),
        ("sample_top1", 2, "k = 1, not 2"),
        ("soft", 2, "k = 4, not 2"),
    ],
)
def test_a_rule_refuses_a_number_of_experts_that_contradicts_it(rule: str, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(logits(3, 4), rule, k)
    with pytest.raises(ValueError, match=message):
        experts_per_token(rule, k=k, experts=4)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step -1 is negative"):
        temperature(-1)
