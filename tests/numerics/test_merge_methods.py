"""The ways to average: identities that each must keep, through mergekit where it is not the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from btx.averaging import mean, shared
from btx.settings import SharedSettings

BASE = torch.linspace(-1, 1, 24).reshape(4, 6)
METHODS = ["mean", "linear", "ties", "dare_ties", "slerp", "model_stock"]


def moved(number: int) -> torch.Tensor:
    """The base, moved somewhere."""
    return BASE + 0.1 * torch.randn(BASE.shape, generator=torch.Generator().manual_seed(number))


def run(tensors: dict[str, torch.Tensor], method: str, *, seed: int = 0, **more: Any) -> torch.Tensor:
    """One averaged tensor."""
    return shared(tensors, BASE, SharedSettings(method=method, **more), name="w", seed=seed)


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_the_seed_average_to_it(method: str) -> None:
    names = ["a", "seed"] if method == "slerp" else ["a", "b", "seed"]
    found = run(dict.fromkeys(names, BASE), method)
    torch.testing.assert_close(found, BASE, atol=1e-6, rtol=0)


def test_linear_with_equal_weights_is_the_mean() -> None:
    tensors = {"a": moved(1), "b": moved(2), "seed": BASE}
    torch.testing.assert_close(run(tensors, "linear"), mean(list(tensors.values())))


def test_linear_weighs_by_name() -> None:
    found = run({"a": moved(1), "seed": BASE}, "linear", weights={"a": 3.0, "seed": 1.0})
    torch.testing.assert_close(found, 0.75 * moved(1) + 0.25 * BASE)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_ends_at_the_models_themselves(t: float) -> None:
    torch.testing.assert_close(run({"a": moved(1), "seed": BASE}, "slerp", t=t), BASE if t else moved(1))


def test_ties_at_full_density_of_agreeing_experts_is_their_mean() -> None:
    delta = torch.rand(BASE.shape, generator=torch.Generator().manual_seed(5)) + 0.1
    found = run({"a": BASE + delta, "b": BASE + 3 * delta}, "ties", density=1.0)
    torch.testing.assert_close(found, BASE + 2 * delta)


def test_ties_drops_what_most_do_not_agree_on() -> None:
    up, down = torch.full_like(BASE, 0.3), torch.full_like(BASE, -0.1)
    torch.testing.assert_close(run({"a": BASE + up, "b": BASE + down}, "ties", density=1.0), BASE + up)


def test_dare_depends_on_its_seed_only() -> None:
    tensors = {"a": moved(1), "b": moved(2)}
    torch.manual_seed(1)
    first = run(tensors, "dare_ties")
    torch.manual_seed(2)
    assert torch.equal(first, run(tensors, "dare_ties"))
    assert not torch.equal(first, run(tensors, "dare_ties", seed=1))


def test_model_stock_of_equal_experts_is_that_expert() -> None:
    tensors = {"a": moved(1), "b": moved(1), "seed": BASE}
    torch.testing.assert_close(run(tensors, "model_stock"), moved(1))


def test_the_mean_does_not_change_its_inputs() -> None:
    a, b = moved(1), moved(2)
    before = a.clone()
    mean([a, b])
    assert torch.equal(a, before)
