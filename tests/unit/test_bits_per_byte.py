"""Bits per byte: equal to the definition, however documents are cut and batched; intervals with their coverage."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from btx.models import opened
from btx.models.opened import Stock
from btx.probes.bits_per_byte import bits_per_byte, interval, nats, windows
from btx.recipe.settings import EvaluateSettings
from btx.steps.evaluate import summarise
from tests.support import moe_models
from tests.support.models import FAMILIES, config_of

CHANCE = np.random.default_rng(0)
DOCUMENTS = [(CHANCE.integers(0, 9, n), 3 * n) for n in (2, 5, 8, 9, 30)]


class OneHot(nn.Module):
    """A model body whose output is the one-hot encoding of its input token."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(last_hidden_state=functional.one_hot(input_ids, 9).float())


class Bigram(nn.Module):
    """A model whose next-token distribution depends on the current token alone, so windows change nothing."""

    device = torch.device("cpu")
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    base_model_prefix, config = "model", SimpleNamespace(vocab_size=9)

    def __init__(self) -> None:
        super().__init__()
        self.model = self.body = OneHot()

    @property
    def base_model(self) -> nn.Module:
        return self.body

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int = 0) -> Any:
        hidden = self.model(input_ids, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=hidden[:, -logits_to_keep:] @ self.table)


def exact(ids: np.ndarray) -> float:
    """Minus the sum of log p of every token after the first."""
    log_p = Bigram.table.double().log_softmax(-1)
    return -sum(float(log_p[a, b]) for a, b in itertools.pairwise(ids))


@pytest.mark.parametrize("length", [1, 4, 7, 100])
@pytest.mark.parametrize("batch_tokens", [1, 16, 1000])
def test_every_token_is_scored_once_however_it_is_cut(length: int, batch_tokens: int) -> None:
    found = nats(Stock(Bigram()), DOCUMENTS, length=length, batch_tokens=batch_tokens)
    assert found == pytest.approx([exact(ids) for ids, _ in DOCUMENTS], rel=1e-5)


MODELS = (*FAMILIES, *moe_models.FAMILIES, "granitemoe", "jetmoe")


def model_of(name: str) -> Any:
    """A pico model of a family, dense or not."""
    from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM

    if name in FAMILIES:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_of(name, attn_implementation="eager")).eval()
    if name == "jetmoe":
        shape = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 2}
        return JetMoeForCausalLM(JetMoeConfig(**shape, kv_channels=8, intermediate_size=24, num_local_experts=4)).eval()
    return moe_models.build(name, **({"logits_scaling": 0.3} if name == "granitemoe" else {})).eval()


@pytest.mark.parametrize("logits", [31, 31 * 7, 2**24])
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_logits_of_the_whole_model_in_every_family(
    name: str, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "LOGITS", logits)
    net = model_of(name)
    documents = [(CHANCE.integers(0, 31, n), n) for n in (2, 5, 14, 9)]
    found = nats(Stock(net), documents, length=100, batch_tokens=64)
    with torch.no_grad():
        whole = [net(input_ids=torch.from_numpy(ids[None, :-1])).logits[0].double() for ids, _ in documents]
    wanted = [
        float(functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="sum"))
        for logits, (ids, _) in zip(whole, documents, strict=True)
    ]
    assert found == pytest.approx(wanted, rel=2e-5)
    assert net.model is net.base_model
    assert isinstance(net.get_submodule("model"), type(net.base_model))


def test_the_logits_of_a_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "LOGITS", 300 * 4)
    net = model_of("llama")
    sizes: list[int] = []
    net.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel()))
    nats(Stock(net), [(CHANCE.integers(0, 300, 41), 40)] * 3, length=100, batch_tokens=1000)
    assert max(sizes) <= 300 * 4
    assert sum(sizes) == 300 * (3 + 120)  # one position a row in the pass of the body


def test_windows_predict_each_token_after_the_first_exactly_once() -> None:
    for length in (1, 3, 8):
        pieces = windows(DOCUMENTS, length)
        assert sum(len(ids) - 1 for _, ids in pieces) == sum(len(ids) - 1 for ids, _ in DOCUMENTS)
        assert max(len(ids) for _, ids in pieces) <= length + 1


def test_a_uniform_model_has_the_bits_of_its_alphabet() -> None:
    assert bits_per_byte(np.array([7 * math.log(256)]), np.array([7.0])) == pytest.approx(8.0)


def test_intervals_hold_the_value_shrink_with_documents_and_repeat() -> None:
    few, many = (CHANCE.gamma(5, 1, n) for n in (20, 2000))
    spans = [interval(v, np.full(len(v), 3.0), resamples=400, seed=1, sources=[*range(len(v))]) for v in (few, many)]
    for v, (low, high) in zip((few, many), spans, strict=True):
        assert low < bits_per_byte(v, np.full(len(v), 3.0)) < high
    assert spans[1][1] - spans[1][0] < (spans[0][1] - spans[0][0]) / 3
    assert spans[0] == interval(few, np.full(20, 3.0), resamples=400, seed=1, sources=[*range(20)])


def test_a_constant_gain_over_the_seed_is_certain_though_the_documents_differ() -> None:
    sizes = np.full(30, 2.0)
    seed = CHANCE.gamma(5, 1, 30)
    documents = {"d": [(np.zeros(3), 2)] * 30}
    scores = {"seed": {"d": seed}, "m": {"d": seed - 0.1 * sizes}}
    found = summarise(scores, documents, {"d": [*range(30)]}, EvaluateSettings(bootstrap=100))
    low, high = found["difference_from_seed_95"]["m"]["d"]
    assert low == pytest.approx(high)
    assert low == pytest.approx(-0.1 / math.log(2))
    low, high = found["interval_95"]["m"]["d"]
    assert high - low > 0.1


def test_pieces_of_one_source_are_drawn_together() -> None:
    nats, sizes = CHANCE.gamma(5, 1, 40), np.full(40, 3.0)
    alone = interval(nats, sizes, resamples=500, seed=3, sources=[*range(40)])
    copied = interval(np.repeat(nats, 5), np.repeat(sizes, 5), resamples=500, seed=3, sources=np.repeat(range(40), 5))
    naive = interval(np.repeat(nats, 5), np.repeat(sizes, 5), resamples=500, seed=3, sources=[*range(200)])
    assert copied == pytest.approx(alone)  # five equal pieces say no more than one
    assert naive[1] - naive[0] < 0.7 * (alone[1] - alone[0])
