"""Identities of the merge: what must hold for every family, number of experts and routing."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from btx.merge.averaging import SharedTensors
from btx.merge.canonical import opened_canonical
from btx.merge.write import RouterScales, write_average
from btx.models.families import DENSE
from btx.models.family import GATE
from btx.models.model import published
from btx.moe.dialects import matrix_of
from btx.moe.hooks import Routed, find_routers
from btx.moe.routing import statistics
from btx.recipe.merge_settings import MergeSettings
from tests.support.merges import CARRIED, carried, load, logits, merge
from tests.support.models import FAMILIES, config_of, save_model


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_copies_of_a_seed_give_its_logits(tmp_path: Path, family: str, top_k: int, implementation: str) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    merged = merge(tmp_path / "moe", [seed] * 3, top_k=top_k, router_entropy=0.8)
    torch.testing.assert_close(logits(load(merged, implementation)), logits(load(seed)), atol=1e-5, rtol=0)


BIASED = ("qwen3", "olmo2", "granite")  # and qwen2, always; the others' MoE class has no place for one


@pytest.mark.parametrize("what", CARRIED)
def test_what_the_config_says_is_carried_over(tmp_path: Path, family: str, what: str) -> None:
    changed = carried(family, what)
    if changed is None:
        pytest.skip("transformers has it not in this family")
    plain = logits(load(save_model(tmp_path / "plain", config_of(family))))
    seed = save_model(tmp_path / "seed", config_of(family, **changed))
    merged = merge(tmp_path / "moe", [seed] * 2, top_k=2)
    torch.testing.assert_close(logits(load(merged)), logits(load(seed)), atol=1e-5, rtol=0)
    if "rope" in what:
        assert (logits(load(seed)) - plain).abs().max() > 1e-4, "the field does nothing here, so the test shows nothing"


@pytest.mark.parametrize("name", BIASED)
def test_biases_of_attention_are_carried_over(tmp_path: Path, name: str) -> None:
    seed = save_model(tmp_path / "seed", config_of(name, attention_bias=True))
    tensors = load_file(seed / "model.safetensors")
    assert all(t.abs().max() > 0.1 for n, t in tensors.items() if n.endswith("q_proj.bias"))
    merged = merge(tmp_path / "moe", [seed] * 2, top_k=2)
    torch.testing.assert_close(logits(load(merged)), logits(load(seed)), atol=1e-5, rtol=0)


def test_the_sliding_layers_of_qwen2_are_carried_over(tmp_path: Path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    seed = save_model(tmp_path / "seed", config_of("qwen2", **sliding))
    plain = save_model(tmp_path / "plain", config_of("qwen2"))
    merged = merge(tmp_path / "moe", [seed] * 2, top_k=2)
    torch.testing.assert_close(logits(load(merged)), logits(load(seed)), atol=1e-5, rtol=0)
    assert (logits(load(seed)) - logits(load(plain))).abs().max() > 1e-4


@pytest.mark.parametrize("form", [{"experts": "split", "chunks": 4}, {"experts": "blend"}], ids=str)
def test_split_and_blended_copies_give_the_seed_when_all_experts_count_alike(
    tmp_path: Path, family: str, form: dict[str, Any]
) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    count = 12 if form["experts"] == "split" else 3
    merged = merge(tmp_path / "moe", [seed] * 3, top_k=count, router_entropy=1.0, **form)
    torch.testing.assert_close(logits(load(merged)), logits(load(seed)), atol=1e-5, rtol=0)


def every_tensor(name: str) -> list[str]:
    """Names of all tensors of a pico model of a family."""
    model = AutoModelForCausalLM.from_config(config_of(name))
    return [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize(("name", "tensor"), [(f, t) for f in sorted(DENSE) for t in every_tensor(f)])
def test_a_change_of_any_one_tensor_shows(tmp_path: Path, name: str, tensor: str) -> None:
    """The identity must be able to fail: changing one tensor of one copy changes the logits."""
    seed = save_model(tmp_path / "seed", config_of(name))
    model = load(seed)
    with torch.no_grad():
        parameter = dict(model.named_parameters())[tensor]
        parameter.add_(torch.linspace(0.2, 0.4, parameter.numel()).reshape(parameter.shape))
    model.save_pretrained(tmp_path / "other")
    merged = merge(tmp_path / "moe", [seed, tmp_path / "other"], top_k=2, base=0)
    assert (logits(load(merged)) - logits(load(seed))).abs().max() > 1e-4


def test_a_one_hot_router_gives_one_expert_on_the_averaged_rest(tmp_path: Path, family: str) -> None:
    folders = [save_model(tmp_path / str(i), config_of(family), noise=0.05 * i) for i in range(3)]
    model = load(merge(tmp_path / "moe", folders, top_k=1))
    average = tmp_path / "average"
    average.mkdir()
    with ExitStack() as stack:
        models = {str(i): stack.enter_context(opened_canonical(f)) for i, f in enumerate(folders)}
        write_average(average, models, models["0"], MergeSettings())
    averaged, expert = load_dense(average, folders[1]), load(folders[1])
    for target, source in zip(averaged.model.layers, expert.model.layers, strict=True):
        feed_forward(target).load_state_dict(feed_forward(source).state_dict())
    for router in find_routers(model).values():
        router.register_forward_hook(lambda _m, _i, out: (out[0], out[1] * 0 + 1, out[2] * 0 + 1))
    torch.testing.assert_close(logits(model), logits(averaged), atol=1e-5, rtol=0)


def feed_forward(layer: Any) -> Any:
    """A dense layer's feed-forward block."""
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp


def load_dense(weights: Path, like: Path) -> Any:
    """A dense model of `like`'s config with other weights."""
    (weights / "config.json").write_bytes((like / "config.json").read_bytes())
    return load(weights)


def test_a_zero_router_over_all_experts_gives_the_mean_of_their_outputs(tmp_path: Path, family: str) -> None:
    folders = [save_model(tmp_path / str(i), config_of(family), noise=0.05 * i) for i in range(3)]
    model = load(merge(tmp_path / "moe", folders, top_k=3, router_entropy=1.0))
    experts = [feed_forward(load(f).model.layers[0]) for f in folders]
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = torch.stack([e(x) for e in experts]).mean(0)
        layer = model.model.layers[0]
        if family == "gemma4_text":  # has the experts and their router in the layer itself
            weights, chosen = layer.router(x[0])[1:]
            torch.testing.assert_close(layer.experts(x[0], chosen, weights)[None], wanted, atol=1e-5, rtol=1e-6)
        else:
            block = getattr(layer, DENSE[family].block)
            torch.testing.assert_close(block(x), wanted, atol=1e-5, rtol=0)


def test_permuting_experts_with_their_router_rows_changes_nothing(tmp_path: Path, family: str) -> None:
    folders = [save_model(tmp_path / str(i), config_of(family), noise=0.05 * i) for i in range(3)]
    model = load(merge(tmp_path / "moe", folders, top_k=2, router_entropy=0.5))
    before, order = logits(model), [2, 0, 1]
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            routers = (".gate.weight", ".router.weight", ".gate.wg.weight", ".router.proj.weight")
            if name.endswith((*routers, ".experts.gate_up_proj", ".experts.down_proj")):
                tensor.copy_(tensor[order].clone())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def wide(tmp_path: Path, family: str) -> tuple[Path, Any, torch.Tensor]:
    """A wider seed, four copies of it merged, and ids."""
    deep = {"num_hidden_layers": 4, "rms_norm_eps": 1e-12, "layer_norm_eps": 1e-12, "norm_eps": 1e-12}
    deep |= {k: 2 * v for k, v in FAMILIES[family].items() if k in ("layer_types", "layer_rope_theta")}
    seed = save_model(tmp_path / "seed", config_of(family, hidden_size=256, head_dim=16, **deep))
    model = load(merge(tmp_path / "moe", [seed] * 4, top_k=2, router_entropy=0.8))
    return seed, model, torch.randint(0, 300, (16, 64), generator=torch.Generator().manual_seed(3))


def test_the_scale_of_what_a_router_sees_is_foretold_from_the_weights(tmp_path: Path, family: str) -> None:
    seed, model, ids = wide(tmp_path, family)
    seen: list[float] = []
    for router in find_routers(model).values():
        matrix_of(router).register_forward_pre_hook(lambda _m, args: seen.append(float(args[0].square().mean())))
    with opened_canonical(seed) as base, torch.inference_mode():
        model(input_ids=ids)
        scales = RouterScales(DENSE[family], SharedTensors({"a": base}, base, MergeSettings()))
        foretold = [float(scales(layer).square().mean()) for layer in range(4)]
    assert foretold == pytest.approx(seen, rel=0.15)


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_a_fresh_router_has_the_asked_entropy(tmp_path: Path, family: str) -> None:
    _, model, ids = wide(tmp_path, family)
    with Routed(model, "top_k", 2) as routed, torch.inference_mode():
        model(input_ids=ids)
        found = [layer.entropy_share for layer in statistics(routed.layers)]
    assert found == pytest.approx([0.8] * 4, abs=0.05)


def test_two_merges_have_the_same_bytes(tmp_path: Path, family: str) -> None:
    folders = [save_model(tmp_path / str(i), config_of(family), noise=0.05 * i) for i in range(2)]
    first, second = (merge(tmp_path / name, folders, top_k=2) for name in ("a", "b"))
    for file in ("model.safetensors", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_shared_tensors_are_averaged_in_fp32_and_cast_once(tmp_path: Path) -> None:
    folders = [
        save_model(tmp_path / str(i), config_of("llama"), noise=0.02 * i, dtype=torch.bfloat16) for i in range(5)
    ]
    merged = load_file(merge(tmp_path / "moe", folders, top_k=2) / "model.safetensors")
    tensors = [load_file(f / "model.safetensors") for f in folders]
    name = "model.layers.1.self_attn.q_proj.weight"
    exact = torch.stack([t[name].double() for t in tensors]).mean(0)
    assert merged[name].dtype == torch.bfloat16
    assert torch.equal(merged[name], exact.float().bfloat16())
    in_bf16 = sum(t[name] for t in tensors) / 5
    assert not torch.equal(merged[name], in_bf16), "the cheap way would have passed too: the test shows nothing"


def test_published_names_are_those_that_transformers_loads(tmp_path: Path, family: str) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    folder = merge(tmp_path / "moe", [seed, seed], top_k=2)
    model = load(folder)
    tied = model.config.tie_word_embeddings
    state = {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    written = load_file(folder / "model.safetensors")
    named = published(DENSE[family], state)
    assert named.keys() == written.keys()
    assert all(torch.equal(named[n], written[n]) for n in written)
    ours = DENSE[family]
    more = (2 if ours.stacked else 6) - len(ours.feed_forward)  # tensors of a layer's experts for those of its block
    more += sum(len(parts) - 1 for parts in ours.parts.values() if GATE not in parts)  # of joined ones that are not
    more += 3 + bool(ours.shared.gate) if ours.shared and not ours.shared.count_field else 0
    more += len(ours.constants) + len(ours.copies) + bool(ours.input_scale) + 1  # and a router
    assert len(written) == len(load_file(seed / "model.safetensors")) + 2 * more
