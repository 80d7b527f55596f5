"""Proxy-tuning: its identities, the formula of the paper, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from btx.conversions.pipeline import Graph
from btx.conversions.proxy import Proxy, ProxyRule
from btx.conversions.registry import load_recipe, open_model
from btx.errors import ArtifactError
from btx.models.composed import Composed
from btx.models.generation import generate
from btx.models.opened import Opened, Stock
from btx.recipe.settings import RunSettings
from tests.support.command import btx
from tests.support.models import config_of, save_model, tokenizer_into
from tests.support.project import write_project

IDS = torch.randint(1, 31, (2, 12), generator=torch.Generator().manual_seed(0))


def model_of(seed: int, **config: Any) -> Stock:
    """A pico model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return Stock(AutoModelForCausalLM.from_config(config_of("llama", attn_implementation="eager", **config)).eval())


BASE, ONE, OTHER, ANTI = (model_of(n) for n in range(4))


def steered(weights: dict[str, float], *, base: Opened = BASE, anti: Opened | None = ANTI, **experts: Opened) -> Opened:
    """A base steered by experts; without an antiexpert the base is its own."""
    parts = {"base": base, **{f"expert:{name}": one for name, one in experts.items()}}
    rule = ProxyRule(weights=weights)
    return Composed(
        {**parts, "antiexpert": anti} if anti else parts, lambda log_p, ids: Proxy.combine(rule, log_p, ids)
    )


def close(one: Opened, other: Opened) -> bool:
    """Whether two models have the same distributions."""
    return torch.allclose(one.log_probs(IDS), other.log_probs(IDS), atol=1e-5)


def logits(model: Stock) -> Tensor:
    """Raw logits."""
    with torch.inference_mode():
        found: Tensor = model.net(input_ids=IDS).logits
    return found


def test_without_weight_it_is_the_base() -> None:
    assert close(steered({"a": 0.0, "b": 0.0}, a=ONE, b=OTHER), BASE)


def test_an_expert_that_is_the_antiexpert_changes_nothing() -> None:
    assert close(steered({"a": 3.0}, a=ANTI), BASE)
    assert not close(steered({"a": 3.0}, a=ONE), BASE)


def test_a_base_that_is_the_antiexpert_becomes_the_expert() -> None:
    assert close(steered({"a": 1.0}, base=ANTI, a=ONE), ONE)
    assert close(steered({"a": 1.0}, base=ANTI, anti=None, a=ONE), ONE)


def test_it_is_the_softmax_of_summed_logits() -> None:
    scores = logits(BASE) + 0.7 * (logits(ONE) - logits(ANTI)) - 0.2 * (logits(OTHER) - logits(ANTI))
    found = steered({"a": 0.7, "b": -0.2}, a=ONE, b=OTHER)
    assert torch.allclose(found.log_probs(IDS), scores.log_softmax(-1), atol=1e-5)
    by_seed = logits(BASE) + 0.7 * (logits(ONE) - logits(BASE)) + 0.7 * (logits(OTHER) - logits(BASE))
    routed = steered({"a": 0.7, "b": 0.7}, anti=None, a=ONE, b=OTHER)
    assert torch.allclose(routed.log_probs(IDS), by_seed.log_softmax(-1), atol=1e-5)


def test_generation_with_caches_is_the_full_computation() -> None:
    model = steered({"a": 1.5}, a=ONE)
    ids = IDS
    for _ in range(8):
        ids = torch.cat([ids, model.log_probs(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, IDS, most=8), ids[:, IDS.shape[1] :])
    random = [torch.Generator().manual_seed(5) for _ in range(2)]
    cached = generate(model, IDS, most=1, temperature=0.5, random=random[0])
    once = torch.multinomial((model.log_probs(IDS)[:, -1] / 0.5).softmax(-1), 1, generator=random[1])
    assert torch.equal(cached, once)  # temperature acts on the combination, not on its parts


def test_rows_that_pad_a_vocabulary_are_cut() -> None:
    wide = model_of(0, vocab_size=340)
    vocabulary = BASE.net.config.vocab_size
    padded = steered({"a": 1.0}, base=wide, a=ONE)
    assert wide.log_probs(IDS).shape[-1] == 340 != vocabulary
    scores = logits(wide)[..., :vocabulary] + logits(ONE) - logits(ANTI)
    assert torch.allclose(padded.log_probs(IDS), scores.log_softmax(-1), atol=1e-5)


def test_a_run_steers_another_base_and_the_result_loads_again(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    save_model(tmp_path / "large", config_of("llama", num_hidden_layers=3), seed=9)
    said = ("--set", "proxy={base: large, weights: {math: 1.5}}", "--set", "domains.math.tokens=512", "--set",
            "domains.code.tokens=512")  # fmt: skip
    btx("run", "recipe.yaml", *said, "--until", "proxy", cwd=tmp_path)
    where = RunSettings(device="cpu", threads=1)
    sets = [text for text in said if text != "--set"]
    graph = Graph(load_recipe(recipe, [*sets, f"run.directory={tmp_path / 'runs'}"]), tmp_path)
    folders = [graph.steps["proxy"].folder, tmp_path / "large", graph.steps["train:math"].folder, tmp_path / "seed"]
    found = []
    for folder in folders:
        with open_model(folder, where=where) as model:
            found.append(model.log_probs(IDS))
    whole, base, expert, seed = found
    assert torch.allclose(whole, (base + 1.5 * (expert - seed)).log_softmax(-1), atol=1e-4)


def test_it_refuses_what_cannot_be_combined(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    refused = btx("plan", "recipe.yaml", "--set", "proxy={weights: {maths: 1}}", cwd=tmp_path, code=2)
    assert "proxy.weights: there is no expert 'maths'; did you mean 'math'?" in refused.stderr
    assert (
        "proxy.base: there is no folder"
        in btx("run", "recipe.yaml", "--set", "proxy={base: nowhere}", cwd=tmp_path, code=3).stderr
    )
    tokenizer_into(save_model(tmp_path / "other", config_of("llama")), extra="other words of another tokenizer")
    graph = Graph(load_recipe(recipe, ["proxy={antiexpert: other}"]), tmp_path)
    with pytest.raises(ArtifactError, match=r"^proxy.antiexpert \(.*other\) has another tokenizer than the seed"):
        graph.steps["proxy"].check(0)
