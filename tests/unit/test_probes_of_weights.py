"""Weights against the seed's, by hand; speed as something that was timed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from btx.models.opened import Stock
from btx.probes import speed, weights
from btx.probes.contract import Data
from btx.probes.registry import probes
from tests.support.models import config_of

DATA = Data({"d": [(np.arange(1, 20), 20)]}, length=8, batch_tokens=100)


def net_of(family: str = "qwen3") -> Stock:
    """A pico dense model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return Stock(AutoModelForCausalLM.from_config(config_of(family)).eval())


def mixture_of(seed: Stock) -> Stock:
    """A Qwen3-MoE of three copies of a seed's blocks, the last one doubled."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    said = {k: v for k, v in seed.net.config.to_dict().items() if k not in ("model_type", "architectures")}
    net = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        **said, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=said["intermediate_size"],
        norm_topk_prob=True, decoder_sparse_step=1,
    ))  # fmt: skip
    with torch.no_grad():
        missing, _ = net.load_state_dict(
            {n: p for n, p in seed.net.state_dict().items() if ".mlp." not in n}, strict=False
        )
        assert all(".mlp." in name for name in missing)
        for layer, dense in zip(net.model.layers, seed.net.model.layers, strict=True):
            both = torch.cat([dense.mlp.gate_proj.weight, dense.mlp.up_proj.weight])
            for n, scale in enumerate((1.0, 1.0, 2.0)):
                layer.mlp.experts.gate_up_proj[n] = scale * both
                layer.mlp.experts.down_proj[n] = scale * dense.mlp.down_proj.weight
    return Stock(net.eval())


def test_nothing_has_moved_from_itself_and_a_change_shows_in_its_group_and_layer() -> None:
    seed, model = net_of(), net_of()
    same = weights.measure(model, seed, DATA, None)
    assert {group: round(one["cosine"], 9) for group, one in same.numbers.items()} == dict.fromkeys(same.numbers, 1.0)
    assert set(same.numbers) == {"embeddings", "norms", "attention", "feed_forward"}
    with torch.no_grad():
        changed = model.net.model.layers[1].self_attn.q_proj.weight
        before = changed.detach().clone()
        changed.add_(0.1)
        changed = changed.detach()
    found = weights.measure(model, seed, DATA, None)
    moved = [row for row in found.rows if row["change"] > 0]
    assert [(row["tensor"], row["layer"], row["group"]) for row in moved] == [
        ("model.layers.1.self_attn.q_proj.weight", 1, "attention")
    ]
    assert moved[0]["change"] == pytest.approx(float((changed - before).norm() / before.norm()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), changed.flatten(), dim=0)
    assert moved[0]["cosine"] == pytest.approx(float(cosine), rel=1e-5)
    whole = [p for n, p in seed.net.named_parameters() if "attn" in n and "norm" not in n]
    norm = sum(float(p.detach().double().norm() ** 2) for p in whole) ** 0.5
    assert found.numbers["attention"]["change"] == pytest.approx(float((changed - before).norm()) / norm, rel=1e-4)


def test_every_expert_is_compared_with_the_seed_s_block() -> None:
    seed = net_of()
    found = weights.measure(mixture_of(seed), seed, DATA, None)
    blocks = [row for row in found.rows if row["group"] == "feed_forward"]
    assert len(blocks) == 2 * 3 * 3
    assert {row["expert"]: round(row["change"], 6) for row in blocks} == {0: 0, 1: 0, 2: 1}
    assert all(row["cosine"] == pytest.approx(1) for row in blocks)
    assert not any("gate.weight" in row["tensor"] for row in found.rows)  # routers


def test_another_width_is_told_and_not_compared() -> None:
    from transformers import AutoModelForCausalLM

    wide = Stock(AutoModelForCausalLM.from_config(config_of("llama", hidden_size=64)).eval())
    assert weights.measure(wide, net_of(), DATA, None).missing


def test_speed_is_that_of_what_was_decoded() -> None:
    seen: list[int] = []

    class Counted(Stock):
        def decode(self, ids_B: torch.Tensor, cache: object) -> object:  # type: ignore[override]
            seen.append(int(ids_B))
            return super().decode(ids_B, cache)

    settings = speed.SpeedSettings(prompt_tokens=30, new_tokens=5, rounds=2)
    found = speed.measure(Counted(net_of().net), None, DATA, settings)
    assert len(found.rows) == 2
    assert len(seen) == 5 * 3
    assert seen[:5] == seen[5:10] == [*range(12, 17)]  # the text goes round
    assert found.numbers["all"]["tokens_per_second"] > 0
    assert {"weights", "speed"} <= probes().keys()
