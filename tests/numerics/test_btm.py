"""Branch-Train-Merge: weights against tf-idf done by hand, and the identities of a mixture of distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from btx.conversions.btm import Btm, BtmSettings, Tfidf, fitted, weights
from btx.models.composed import Composed
from btx.models.generation import generate
from btx.models.opened import Stock
from tests.support.models import config_of

CHANCE = np.random.default_rng(0)
TEXTS = [CHANCE.integers(low, low + 12, 400) for low in (0, 6, 16)]  # three domains that share some ids
IDS = torch.tensor(np.stack([np.concatenate([TEXTS[0][:3], TEXTS[2][:13]]), TEXTS[1][:16]]))


def tfidf(**settings: Any) -> Tfidf:
    """Fitted on the three domains."""
    said = BtmSettings(window=50, **settings)
    return Tfidf(said, *fitted(TEXTS, said.window))


def model_of(seed: int) -> Stock:
    """A pico model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return Stock(AutoModelForCausalLM.from_config(config_of("llama", attn_implementation="eager")).eval())


def mixed(parts: list[Stock], **settings: Any) -> Composed:
    """Experts mixed by the three domains."""
    state = tfidf(**settings)
    return Composed({str(n): part for n, part in enumerate(parts)}, lambda log_p, ids: Btm.combine(state, log_p, ids))


def by_hand(prefix: list[int], *, top_k: int, temperature: float) -> list[float]:
    """The weights of the experts, by the definitions, a document at a time."""
    documents = [[text[n : n + 50] for n in range(0, 400, 50)] for text in TEXTS]
    every = [set(one.tolist()) for rows in documents for one in rows]

    def vector(ids: list[int]) -> dict[int, float]:
        raw = {i: ids.count(i) * (math.log((1 + len(every)) / (1 + sum(i in one for one in every))) + 1) for i in ids}
        norm = math.sqrt(sum(x * x for x in raw.values()))
        return {i: x / norm for i, x in raw.items()}

    cosines = []
    for rows in documents:
        found = [vector(one.tolist()) for one in rows]
        centre = {i: sum(one.get(i, 0.0) for one in found) for i in range(40)}
        norm = math.sqrt(sum(x * x for x in centre.values()))
        cosines.append(sum(x * centre.get(i, 0.0) / norm for i, x in vector(prefix).items()))
    kept = sorted(cosines)[-top_k:]
    raised = [math.exp(c / temperature) if c in kept else 0.0 for c in cosines]
    return [x / sum(raised) for x in raised]


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 0.1), (2, 0.1), (3, 1.0)])
def test_weights_are_tf_idf_of_the_text_so_far(top_k: int, temperature: float) -> None:
    found = weights(tfidf(top_k=top_k, temperature=temperature), IDS)
    assert found.shape == (3, 2, 16)
    for row, ids in enumerate(IDS.tolist()):
        for at in range(16):
            expected = by_hand(ids[: at + 1], top_k=top_k, temperature=temperature)
            assert found[:, row, at].tolist() == pytest.approx(expected, abs=1e-5)


def test_an_id_that_no_training_text_had_is_like_no_domain() -> None:
    found = weights(tfidf(top_k=3), torch.tensor([[999, 999]]))
    assert found.flatten().tolist() == pytest.approx([1 / 3] * 6)


def test_experts_that_are_one_model_are_that_model() -> None:
    one = model_of(0)
    assert torch.allclose(mixed([one] * 3, top_k=2).log_probs(IDS), one.log_probs(IDS), atol=1e-5)


def test_the_best_alone_is_the_expert_of_the_domain() -> None:
    parts = [model_of(n) for n in range(3)]
    whole = mixed(parts, top_k=1)
    chosen = weights(tfidf(top_k=1), IDS).argmax(0)
    assert set(chosen.flatten().tolist()) == {0, 1, 2}
    each = torch.stack([part.log_probs(IDS) for part in parts])
    expected = each.gather(0, chosen[None, ..., None].expand(1, *each.shape[1:]))[0]
    assert torch.allclose(whole.log_probs(IDS), expected, atol=1e-5)


def test_probabilities_are_mixed_not_logits() -> None:
    parts = [model_of(n) for n in range(3)]
    shares = weights(tfidf(top_k=2), IDS)
    expected: Tensor = sum(w[..., None] * p.log_probs(IDS).exp() for w, p in zip(shares, parts, strict=True))  # type: ignore[assignment]
    assert torch.allclose(mixed(parts, top_k=2).log_probs(IDS).exp(), expected, atol=1e-6)


def test_only_the_prefix_is_looked_at_and_the_cache_is_the_whole_pass() -> None:
    whole = mixed([model_of(n) for n in range(3)], top_k=2)
    changed = IDS.clone()
    changed[:, 9:] = 3
    assert torch.allclose(whole.log_probs(changed)[:, :9], whole.log_probs(IDS)[:, :9], atol=1e-6)
    log_p, cache = whole.prefill(IDS[:, :6])
    for at in range(6, 16):
        assert torch.allclose(log_p, whole.log_probs(IDS[:, :at])[:, -1], atol=1e-5)
        log_p, cache = whole.decode(IDS[:, at], cache)
    out = generate(whole, IDS[:, :6], most=4)
    assert out.shape == (2, 4)
