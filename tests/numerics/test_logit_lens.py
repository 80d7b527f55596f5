"""The logit lens: its last layer is the model itself in every family, and the others are norm and head done by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from btx.models.opened import Stock
from btx.probes import logit_lens
from btx.probes.contract import Data
from tests.support import moe_models
from tests.support.models import FAMILIES, config_of

CHANCE = np.random.default_rng(0)
DOCUMENTS = [(CHANCE.integers(1, 31, n), n) for n in (12, 5, 30)]
DATA = Data({"d": DOCUMENTS}, length=8, batch_tokens=1000)
ALL = logit_lens.LogitLensSettings(tokens=1000)


def final_norm(net: Any) -> Any:
    """The norm before the output head."""
    body = net.base_model
    return body.norm if hasattr(body, "norm") else body.embedding_norm


def net_of(name: str) -> Any:
    """A pico model whose final norm is no identity."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    net = (
        AutoModelForCausalLM.from_config(config_of(name, initializer_range=0.3))
        if name in FAMILIES
        else moe_models.build(name)
    )
    with torch.no_grad():
        weight = final_norm(net).weight
        weight.copy_(torch.linspace(0.5, 2.0, len(weight)))
    return net.eval()


def pieces() -> list[np.ndarray[Any, Any]]:
    """The windows of the documents."""
    return [ids[start : start + 9] for ids, _ in DOCUMENTS for start in range(0, len(ids) - 1, 8)]


@pytest.mark.parametrize("name", [*FAMILIES, *moe_models.FAMILIES, "granitemoe"])
def test_the_last_layer_is_the_model_itself(name: str) -> None:
    model = Stock(net_of(name))
    found = logit_lens.measure(model, None, DATA, ALL)
    lost, right, count = 0.0, 0, 0
    for ids in pieces():
        inputs, targets = torch.from_numpy(ids[None, :-1]), torch.from_numpy(ids[None, 1:])
        lost += float(model.losses(inputs, targets).sum())
        right += int((model.log_probs(inputs).argmax(-1) == targets).sum())
        count += targets.numel()
    last = found.rows[-1]
    assert len(found.rows) == model.net.config.num_hidden_layers + 1
    assert last["bits_per_token"] == pytest.approx(lost / count / math.log(2), rel=1e-5)
    assert last["accuracy"] == pytest.approx(right / count)
    assert last["nats_to_last"] == pytest.approx(0.0, abs=1e-6)
    assert last["agreement"] == 1.0
    assert found.rows[0]["nats_to_last"] > 0.01  # and the embeddings are not the model
    assert found.numbers["d"]["bits_per_token"] == last["bits_per_token"]


@torch.inference_mode()
def test_lower_layers_are_norm_and_head_by_hand_and_depth_is_where_the_answer_stays() -> None:
    model = Stock(net_of("llama"))
    net = model.net
    found = logit_lens.measure(model, None, DATA, ALL)
    rows: list[list[list[float]]] = [[] for _ in range(3)]
    depths = []
    for ids in pieces():
        states = net(input_ids=torch.from_numpy(ids[None, :-1]), output_hidden_states=True).hidden_states
        logits = [net.lm_head(final_norm(net)(state))[0] for state in states[:-1]] + [net.lm_head(states[-1])[0]]
        log_p = [one.log_softmax(-1) for one in logits]
        for at, target in enumerate(ids[1:].tolist()):
            best = [int(one[at].argmax()) for one in log_p]
            depths.append(next(n for n in range(3) if set(best[n:]) == {best[2]}) / 2)
            for layer, one in enumerate(log_p):
                kl = float((log_p[2][at].exp() * (log_p[2][at] - one[at])).sum())
                rows[layer].append([-float(one[at, target]) / math.log(2), float(best[layer] == target), kl,
                                    float(best[layer] == best[2])])  # fmt: skip
    for layer, row in enumerate(found.rows):
        assert [row[name] for name in logit_lens.COLUMNS] == pytest.approx(
            np.mean(rows[layer], axis=0), rel=1e-4, abs=1e-6
        )
    assert found.numbers["d"]["depth"] == pytest.approx(np.mean(depths))
    assert 0 < np.mean(depths) < 1  # else the test would say nothing
    assert found.numbers["d"]["middle_accuracy"] == found.rows[1]["accuracy"]


def test_it_looks_at_so_many_tokens_and_at_few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stock(net_of("llama"))
    whole = logit_lens.measure(model, None, DATA, ALL).rows
    sizes: list[int] = []
    real = Stock.through_head

    def seen(self: Stock, states: Any, *, normalise: bool) -> Any:
        sizes.append(len(states))
        return real(self, states, normalise=normalise)

    monkeypatch.setattr(Stock, "through_head", seen)
    monkeypatch.setattr(logit_lens, "LOGITS", 3 * 300)
    for row, other in zip(whole, logit_lens.measure(model, None, DATA, ALL).rows, strict=True):
        assert list(row.values())[2:] == pytest.approx(list(other.values())[2:], rel=1e-5, abs=1e-6)
    assert max(sizes) == 3
    sizes.clear()
    logit_lens.measure(model, None, DATA, logit_lens.LogitLensSettings(tokens=11))
    assert sum(sizes) == 11 * 3  # every layer's, of the first eleven tokens
