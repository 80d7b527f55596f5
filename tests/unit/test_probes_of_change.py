"""Forgetting, drift, calibration and degeneracy against their definitions, done by hand on pico models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from btx.models.opened import Stock
from btx.moe.hooks import Routed
from btx.probes import bits_per_byte, calibration, degeneracy, drift, forgetting, knock_out, token_routing
from btx.probes.contract import Data
from btx.probes.registry import probes
from tests.support import moe_models
from tests.support.models import config_of

CHANCE = np.random.default_rng(0)
DOCUMENTS = [(CHANCE.integers(1, 299, n), n) for n in (12, 5, 30)]
DATA = Data({"d": DOCUMENTS}, length=8, batch_tokens=1000)


def net_of(seed: int) -> Stock:
    """A pico Llama of 300 ids."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return Stock(AutoModelForCausalLM.from_config(config_of("llama", initializer_range=0.3)).eval())


def by_hand(model: Stock) -> list[tuple[int, float, bool, float]]:
    """Of every token: its document, the best probability, whether it was right, and the loss; in windows of 8."""
    found = []
    for n, (ids, _) in enumerate(DOCUMENTS):
        for start in range(0, len(ids) - 1, 8):
            window = ids[start : start + 9]
            log_p = model.log_probs(torch.from_numpy(window[None, :-1]))[0]
            for row, target in zip(log_p, window[1:].tolist(), strict=True):
                found.append((n, float(row.max().exp()), int(row.argmax()) == target, -float(row[target])))
    return found


def test_forgetting_counts_items_that_change_sides_less_chance() -> None:
    seed, model = net_of(0), net_of(1)
    found = forgetting.measure(model, seed, DATA, None)
    before, after = by_hand(seed), by_hand(model)
    lost = sum(a[2] and not b[2] for a, b in zip(before, after, strict=True))
    won = sum(b[2] and not a[2] for a, b in zip(before, after, strict=True))
    count = len(before)
    accuracy = [sum(one[2] for one in side) / count for side in (before, after)]
    chance = (1 - accuracy[0]) * (1 - accuracy[1]) / 299
    numbers = found.numbers["d"]
    assert numbers["forgotten"] == pytest.approx(lost / count - chance)
    assert numbers["learned"] == pytest.approx(won / count - chance)
    change = sum(b[3] - a[3] for a, b in zip(before, after, strict=True)) / count
    assert numbers["change_nats_per_token"] == pytest.approx(change, rel=1e-4)
    for n, row in enumerate(found.rows):
        assert row["tokens"] == len(DOCUMENTS[n][0]) - 1
        assert row["nats_before"] == pytest.approx(sum(one[3] for one in before if one[0] == n), rel=1e-4)
        assert row["right_before"] - row["forgotten"] + row["learned"] == row["right_after"]
    same = forgetting.measure(seed, seed, DATA, None)
    assert same.numbers["d"]["change_nats_per_token"] == 0
    assert {row["forgotten"] for row in same.rows} == {row["learned"] for row in same.rows} == {0}


def test_what_is_learned_is_seen_where_a_model_knows_the_text() -> None:
    class Knows(Stock):
        def log_probs(self, ids_BS: torch.Tensor, prompt: int = 0) -> torch.Tensor:
            found = torch.full((*ids_BS.shape, 300), -50.0)
            nexts = {
                tuple(ids[max(0, n - 1) : n + 1]): int(ids[n + 1]) for ids, _ in DOCUMENTS for n in range(len(ids) - 1)
            }
            for b, row in enumerate(ids_BS.tolist()):
                for s in range(len(row)):
                    known = [to for pair, to in nexts.items() if pair[-1] == row[s]]
                    found[b, s, known[0] if known else 0] = 0.0
            return found.log_softmax(-1)

    seed = net_of(0)
    numbers = forgetting.measure(Knows(seed.net), seed, DATA, None).numbers["d"]
    assert numbers["learned"] > 0.8
    assert numbers["change_nats_per_token"] < -1


def test_alignment_ignores_rotation_and_scale_and_sees_the_rest() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 8, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert drift.cka(x, x) == pytest.approx(1)
    assert drift.cka(x, 3 * x @ turned + 5) == pytest.approx(1)
    y = torch.randn(50, 8, dtype=torch.float64)
    k, m = (one - one.mean(0) for one in (x, y))
    k, m = k @ k.T, m @ m.T
    assert drift.cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))  # by kernels
    assert drift.cka(x, y) < 0.6


def test_drift_is_none_from_itself_and_grows_from_the_first_layer_that_differs() -> None:
    seed, model = net_of(0), net_of(0)
    settings = drift.DriftSettings()
    for row in drift.measure(model, seed, DATA, settings).rows:
        assert (row["cka"], row["change"]) == pytest.approx((1, 0))
    with torch.no_grad():
        model.net.model.layers[1].mlp.down_proj.weight.add_(0.3)
    found = drift.measure(model, seed, DATA, settings)
    assert [row["layer"] for row in found.rows] == [0, 1, 2]
    assert [row["change"] > 0 for row in found.rows] == [False, False, True]
    assert found.numbers["d"]["cka_last"] == found.rows[2]["cka"] < 1
    few = drift.measure(model, seed, DATA, drift.DriftSettings(tokens=4))
    assert few.rows[2]["change"] != found.rows[2]["change"]


def test_drift_is_measured_of_a_mixture_too() -> None:
    mixture = Stock(moe_models.build("mixtral").eval())
    documents = [(CHANCE.integers(1, 31, n), n) for n in (9, 14)]
    found = drift.measure(mixture, mixture, Data({"d": documents}, 8, 100), drift.DriftSettings())
    assert found.numbers["d"]["cka"] == pytest.approx(1)


def test_calibration_is_that_of_the_definitions() -> None:
    model = net_of(2)
    found = calibration.measure(model, None, DATA, None)
    tokens = by_hand(model)
    sure, right = [one[1] for one in tokens], [one[2] for one in tokens]
    assert sorted(row["confidence"] for row in found.rows) == pytest.approx(sorted(sure), rel=1e-4)
    numbers = found.numbers["d"]
    assert numbers["accuracy"] == sum(right) / len(right)
    assert numbers["brier"] == pytest.approx(
        np.mean([(c - r) ** 2 for c, r in zip(sure, right, strict=True)]), rel=1e-4
    )
    gaps = 0.0
    for low in range(10):
        inside = [(c, r) for c, r in zip(sure, right, strict=True) if low / 10 <= c < (low + 1) / 10]
        gaps += abs(sum(r - c for c, r in inside))
    assert numbers["ece"] == pytest.approx(gaps / len(sure), rel=1e-4)


def test_auroc_counts_pairs_and_ties_half() -> None:
    sure = np.array([0.9, 0.8, 0.8, 0.3, 0.1])
    right = np.array([True, True, False, False, True])
    pairs = [(a > b) + 0.5 * (a == b) for a in sure[right] for b in sure[~right]]
    assert calibration.scores(sure, right)["auroc"] == pytest.approx(np.mean(pairs))
    assert calibration.scores(sure, np.ones(5, bool))["auroc"] == 0.5
    perfect = calibration.scores(np.array([1.0, 0.0]), np.array([True, False]))
    assert (perfect["ece"], perfect["brier"], perfect["auroc"]) == (0, 0, 1)


def test_repetition_is_what_it_says() -> None:
    assert degeneracy.distinct([[1, 2, 1, 2]], 1) == 0.5
    assert degeneracy.distinct([[1, 2, 1, 2], [3, 4, 5, 6]], 2) == pytest.approx(5 / 6)
    assert degeneracy.repeated([1, 2, 3] * 6)
    assert not degeneracy.repeated(list(range(18)))
    assert not degeneracy.repeated([1, 2, 3] * 3 + [7, 8, 9] * 3)  # stuck, but on something new


def test_continuations_are_the_model_s_own_and_short_documents_are_left_out() -> None:
    model = net_of(0)
    settings = degeneracy.DegeneracySettings(prompts=5, prompt_tokens=6, new_tokens=6)
    found = degeneracy.measure(model, None, DATA, settings)
    assert [row["document"] for row in found.rows] == [0, 2]
    prompt = torch.from_numpy(DOCUMENTS[2][0][None, :6])
    for step in range(6):
        assert int(model.log_probs(prompt)[0, -1].argmax()) == found.rows[1]["ids"][step]
        prompt = torch.cat([prompt, torch.tensor([[found.rows[1]["ids"][step]]])], 1)
    assert found.numbers["d"]["held_out_distinct_2"] == 1.0
    long = degeneracy.measure(model, None, DATA, degeneracy.DegeneracySettings())
    assert "80 tokens" in long.missing


def test_each_is_there_for_a_recipe_to_ask_for() -> None:
    assert {"forgetting", "drift", "calibration", "degeneracy", "knock_out"} <= probes().keys()


def test_an_expert_that_is_knocked_out_gets_no_token_and_its_gate_goes_to_the_others() -> None:
    net = moe_models.build("mixtral").eval()
    documents = [(CHANCE.integers(1, 31, n), 4 * n) for n in (9, 14)]
    data = Data({"d": documents}, 8, 100)
    with Routed(net, "top_k", net.config.num_experts_per_tok) as routed:
        model = Stock(net, routed)
        whole = bits_per_byte.measure(model, None, data, None).numbers["d"]["bits_per_byte"]
        found = knock_out.measure(model, None, data, None)
        assert bits_per_byte.measure(model, None, data, None).numbers["d"]["bits_per_byte"] == whole
        changed = []
        for expert in range(routed.experts):
            routed.without = expert
            model.log_probs(torch.from_numpy(documents[0][0][None]))
            for layer in routed.layers:
                weights = layer.weight_TK.masked_fill(layer.index_TK == expert, 0.0).sum(-1)
                assert weights == pytest.approx(1.0)
                assert float(layer.weight_TK[layer.index_TK == expert].sum()) == 0
            changed.append(bits_per_byte.measure(model, None, data, None).numbers["d"]["bits_per_byte"] - whole)
    assert [row["change"] for row in found.rows] == pytest.approx(changed)
    assert any(abs(change) > 1e-5 for change in changed)
    numbers = found.numbers["d"]
    assert (numbers["most"], numbers["least"]) == (max(changed), min(changed))
    assert changed[int(numbers["expert"])] == numbers["most"]


def test_the_experts_of_every_token_are_those_of_the_routers() -> None:
    net = moe_models.build("mixtral").eval()
    documents = [(CHANCE.integers(1, 31, n), 4 * n) for n in (9, 14, 6)]
    with Routed(net, "top_k", net.config.num_experts_per_tok) as routed:
        model = Stock(net, routed)
        settings = token_routing.TokenRoutingSettings(documents=2, tokens=10)
        found = token_routing.measure(model, None, Data({"d": documents}, 8, 100), settings)
        assert [row["document"] for row in found.rows] == [0] * 9 + [1] * 10
        assert [row["id"] for row in found.rows[:9]] == documents[0][0].tolist()
        logits = net(input_ids=torch.from_numpy(documents[0][0][None]), output_router_logits=True).router_logits
        wanted = torch.stack([layer.argmax(-1) for layer in logits]).T.tolist()
    assert [row["experts"] for row in found.rows[:9]] == wanted
    rows = [found.rows[:9], found.rows[9:]]
    steps = [(one["experts"], two["experts"]) for text in rows for one, two in itertools.pairwise(text)]
    changed = [a != b for one, two in steps for a, b in zip(one, two, strict=True)]
    assert found.numbers["d"]["switches"] == pytest.approx(sum(changed) / len(changed))
