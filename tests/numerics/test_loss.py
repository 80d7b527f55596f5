"""The chunked loss, without a whole batch's logits: equal to the plain loss in value and gradients, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from btx.data.sampler import IGNORED
from btx.models.target import moe_config
from btx.training import loss
from btx.training.loss import cap_of, linear_cross_entropy, output_head, without_head
from tests.support.models import config_of


def case(tokens: int, width: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and targets, some targets ignored and one frequent."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::3], targets[1::7] = 5, IGNORED
    return hidden, weight, targets


def with_gradients(function: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """A loss and the gradients of some tensors, the loss scaled as for a mean over tokens."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    found = function(*leaves)
    (found * 0.37).backward()
    return [found.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


@pytest.mark.parametrize("torchs", [True, False], ids=["torch", "ours"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_chunks_give_the_plain_loss_and_gradients(monkeypatch: Any, tokens: int, torchs: bool) -> None:
    if torchs and not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    if not torchs:
        monkeypatch.delattr(functional, "linear_cross_entropy", raising=False)
    monkeypatch.setattr(loss, "CHUNK", 64 * 97)
    hidden, weight, targets = case(tokens, 24, 97)
    plain = with_gradients(
        lambda h, w: functional.cross_entropy(h @ w.T, targets, ignore_index=IGNORED, reduction="sum"), hidden, weight
    )
    for wanted, got in zip(
        plain, with_gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def test_in_bfloat16_loss_and_weight_gradient_are_summed_in_float32(monkeypatch: Any) -> None:
    """A bfloat16 sum over many chunks would lose part of a frequent row's gradient."""
    monkeypatch.setattr(loss, "CHUNK", 32 * 97)
    hidden, weight, targets = case(2000, 24, 97)
    exact = with_gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden.bfloat16().float(), weight)
    got = with_gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden.bfloat16(), weight)
    assert got[0].dtype == torch.float32
    assert got[2].dtype == torch.float32
    for one, other, tolerance in zip(got, exact, (1e-4, 8e-3, 4e-3), strict=True):
        assert float((one.float() - other).norm() / other.norm()) < tolerance


def test_targets_that_are_all_ignored_cost_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr(loss, "CHUNK", 16 * 97)
    hidden, weight, targets = case(40, 24, 97)
    got = with_gradients(
        lambda h, w: linear_cross_entropy(h.bfloat16(), w, torch.full_like(targets, IGNORED)), hidden, weight
    )
    assert not any(t.any() for t in got)


@pytest.mark.parametrize("rows", [16, 1000])
def test_capped_logits_have_the_loss_and_gradients_of_the_formula(rows: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(loss, "CHUNK", rows * 97)
    hidden, weight, targets = case(40, 24, 97)

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logits = 3.0 * torch.tanh(h @ w.T / 3.0)
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    wanted = with_gradients(plain, hidden, weight)
    got = with_gradients(lambda h, w: linear_cross_entropy(h, w, targets, cap=3.0), hidden, weight)
    uncapped = with_gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
    assert abs(float(uncapped[0] - wanted[0])) > 1e-2
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
def test_a_model_without_its_head_has_the_plain_loss(family: str, mixture: bool) -> None:
    config = config_of(family)
    if mixture:
        config = moe_config(config.to_dict(), experts=3, top_k=2, width=48, where="seed")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 300, (2, 17))
    plain = functional.cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    head = output_head(model)
    assert head is not None
    with without_head(model, head):
        hidden = model(input_ids=ids[:, :-1]).logits
    assert hidden.shape == (2, 16, config.hidden_size)
    got = linear_cross_entropy(hidden.flatten(0, 1), head.weight, ids[:, 1:].flatten(), cap=cap_of(model)) / 32
    torch.testing.assert_close(got, plain, atol=1e-6, rtol=0)
    assert model(input_ids=ids).logits.shape[-1] == 300  # the head is back


def test_a_class_that_is_not_understood_keeps_its_head() -> None:
    from transformers import Gemma2Config

    tiny = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    assert output_head(AutoModelForCausalLM.from_config(Gemma2Config(**tiny))) is None
