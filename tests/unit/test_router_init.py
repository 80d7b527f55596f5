"""Router initialisers with a given entropy, and routing statistics."""

import math

import pytest
import torch
from torch import Tensor

from btx.moe.routing import (
    Routing,
    init_router,
    logit_std,
    statistics,
)
from tests.support.routing_cases import logits, routing, seeded, spread


def mean_entropy_share(logits_TE: Tensor) -> float:
    log_TE = logits_TE.double().log_softmax(-1)
    return float(-(log_TE.exp() * log_TE).sum(-1).mean()) / math.log(logits_TE.shape[-1])


@pytest.mark.parametrize("entropy", [0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("experts", [2, 4, 8, 64])
def test_logits_of_the_solved_deviation_have_the_asked_entropy(experts: int, entropy: float) -> None:
    fresh = torch.randn(20_000, experts, generator=seeded(99))
    got = mean_entropy_share(logit_std(entropy, experts=experts) * fresh)
    assert got == pytest.approx(entropy, abs=0.01)


@pytest.mark.parametrize("entropy", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("experts", [3, 4, 8])
def test_a_new_router_has_the_asked_entropy_on_isotropic_normed_inputs(experts: int, entropy: float) -> None:
    norm_D = 0.05 + torch.rand(1024, generator=seeded(1)) * 3
    weight_ED = init_router(norm_D, experts=experts, entropy=entropy, generator=seeded(2))
    x_TD = torch.randn(10_000, 1024, generator=seeded(3))
    x_TD = norm_D * x_TD * x_TD.pow(2).mean(-1, keepdim=True).rsqrt()
    assert weight_ED.shape == (experts, 1024)
    assert mean_entropy_share(x_TD @ weight_ED.T) == pytest.approx(entropy, abs=0.01)


def test_every_row_of_a_new_router_gives_its_logit_the_same_deviation() -> None:
    norm_D = torch.rand(48, generator=seeded(1)) + 0.1
    weight_ED = init_router(norm_D, experts=5, entropy=0.8, generator=seeded(2))
    want = torch.full((5,), logit_std(0.8, experts=5))
    torch.testing.assert_close((weight_ED * norm_D).norm(dim=-1), want)


def test_a_router_does_not_depend_on_the_scale_of_the_norm_in_what_it_computes() -> None:
    norm_D = torch.rand(48, generator=seeded(1)) + 0.1
    once = init_router(norm_D, experts=4, entropy=0.8, generator=seeded(2))
    hundredfold = init_router(100 * norm_D, experts=4, entropy=0.8, generator=seeded(2))
    torch.testing.assert_close(once, 100 * hundredfold)


def test_a_router_repeats_with_its_generator_and_differs_with_another() -> None:
    first, again, other = (init_router(torch.ones(16), experts=4, entropy=0.9, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_solved_deviation_is_free_of_the_global_random_state_and_falls_with_entropy() -> None:
    before = torch.get_rng_state()
    logit_std.cache_clear()
    first = [logit_std(entropy, experts=4) for entropy in (0.2, 0.6, 0.9)]
    torch.manual_seed(123)
    logit_std.cache_clear()
    assert first == [logit_std(entropy, experts=4) for entropy in (0.2, 0.6, 0.9)]
    assert first == sorted(first, reverse=True)
    torch.set_rng_state(before)
    init_router(torch.ones(16), experts=4, entropy=0.9, generator=seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_the_solved_deviation_does_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logit_std.cache_clear()
            found.add(tuple(logit_std(0.99, experts=experts) for experts in (2, 3, 4)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_full_entropy_is_a_router_of_zeros() -> None:
    assert not init_router(torch.ones(16), experts=4, entropy=1.0, generator=seeded()).any()


@pytest.mark.parametrize("entropy", [0.0, -0.1, 1.01, math.nan])
def test_an_entropy_that_is_no_share_is_refused(entropy: float) -> None:
    with pytest.raises(ValueError, match="is not a share of log E"):
        init_router(torch.ones(16), experts=4, entropy=entropy, generator=seeded())


@pytest.mark.parametrize("norm", [torch.zeros(4), torch.tensor([1.0, math.nan]), torch.ones(2, 2)])
def test_a_norm_weight_that_cannot_scale_a_router_is_refused(norm: Tensor) -> None:
    with pytest.raises(ValueError, match="must be a finite vector over D"):
        init_router(norm, experts=4, entropy=0.9, generator=seeded())


def test_one_expert_is_nothing_to_route() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        logit_std(0.5, experts=1)


# --- statistics --------------------------------------------------------------------------------------------


def test_statistics_of_balanced_routing_are_uniform() -> None:
    (layer,) = statistics([spread(64, 4, 4, 2)])
    assert layer.load == [0.25] * 4
    assert layer.entropy == pytest.approx(math.log(4), abs=1e-6)
    assert layer.entropy_share == pytest.approx(1.0, abs=1e-6)
    assert layer.dead == []


def test_statistics_count_choices_by_hand() -> None:
    index_TK = torch.tensor([[0, 1], [0, 2], [0, 1]])
    weight_TK = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25]], requires_grad=True)
    logits_TE = torch.tensor([[0.0, 0.0, -1e4, -1e4]]).expand(3, 4)
    (layer,) = statistics([Routing(logits_TE, index_TK, weight_TK)])
    assert layer.load == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0.0])
    assert (layer.entropy, layer.entropy_share) == pytest.approx((math.log(2), 0.5), abs=1e-6)
    assert layer.dead == [3]


def test_an_expert_is_dead_below_a_tenth_of_its_share_or_the_stated_one() -> None:
    index_T1 = torch.tensor([[0]] * 76 + [[1]] * 20 + [[2]] * 3 + [[3]])  # a tenth of 1/4 is 2.5 in 100
    record = Routing(torch.zeros(100, 4), index_T1, torch.ones(100, 1))
    assert statistics([record])[0].dead == [3]
    assert statistics([record], dead_below=0.1)[0].dead == [2, 3]
    assert statistics([record], dead_below=0.0)[0].dead == []


def test_statistics_are_plain_numbers_one_entry_a_layer() -> None:
    layers = statistics([routing(logits(8, 3, seed=s)) for s in range(3)])
    assert len(layers) == 3
    for layer in layers:
        assert [type(value) for value in layer] == [list, float, float, list]
        assert {type(share) for share in layer.load} == {float}
        assert sum(layer.load) == pytest.approx(1.0)
