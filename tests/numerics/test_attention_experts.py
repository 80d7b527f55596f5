"""Attention experts: what is exact, what is averaged, how they are routed and trained."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.checkpoints.reader import Checkpoint, opened
from btx.cli.main import graph_of
from btx.errors import ArtifactError, RecipeError
from btx.export.portable import rows
from btx.merge.router_init import fresh_routers
from btx.merge.vocabulary import JointVocabulary, write_joint
from btx.merge.write import write_moe
from btx.models.family import OUTPUT, QUERY
from btx.models.kernels import kernel_of
from btx.models.mixture import Moe
from btx.moe.hooks import Routed, find_routers, router_labels
from btx.moe.routing import statistics
from btx.recipe.merge_settings import MergeSettings
from btx.steps.finetune import freeze
from tests.support.merges import IDS, load, logits, merge, rope
from tests.support.models import config_of, save_model
from tests.support.world import World, refused

FORM = "ffn+attention"
ATTENTION = "model.layers.1.self_attention."


def seed_of(folder: Path, *, noise: float = 0.0, dtype: Any = torch.float32, **more: Any) -> Path:
    """A Llama with as many key heads as query heads."""
    return save_model(folder, config_of("llama", **{"num_key_value_heads": 4, **more}), noise=noise, dtype=dtype)


def moe_of(folder: Path, count: int = 3, *, top_k: int = 2, **settings: Any) -> Path:
    """A Mixture of Experts of different models."""
    dense = [seed_of(folder / f"d{i}", noise=0.1 * i) for i in range(count)]
    return merge(folder / "moe", dense, top_k=top_k, experts=FORM, router_entropy=0.7, **settings)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"head_dim": 12},
        {"tie_word_embeddings": True},
        {"rope_parameters": rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)},
        {"rope_parameters": rope("linear")},
        {"rope_parameters": rope("yarn")},
    ],
    ids=str,
)
def test_copies_of_a_seed_give_its_logits(tmp_path: Path, top_k: int, more: dict[str, Any]) -> None:
    seed = seed_of(tmp_path / "seed", **more)
    model = load(merge(tmp_path / "moe", [seed] * 3, top_k=top_k, experts=FORM, router_entropy=0.7))
    torch.testing.assert_close(logits(model), logits(load(seed)), atol=1e-5, rtol=0)


def test_one_expert_alone_is_its_queries_and_outputs_on_the_averaged_rest(tmp_path: Path) -> None:
    folder = moe_of(tmp_path, top_k=1)
    made, own = (
        load_file(folder / "model.safetensors"),
        [load_file(tmp_path / f"d{i}" / "model.safetensors") for i in range(3)],
    )
    for e, model in enumerate(own):
        assert torch.equal(made[f"{ATTENTION}experts.input_linear.weight"][e], model[f"model.layers.1.{QUERY}"])
        assert torch.equal(made[f"{ATTENTION}experts.output_linear.weight"][e], model[f"model.layers.1.{OUTPUT}"])
    both = [torch.cat([m[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "kv"]) for m in own]
    torch.testing.assert_close(made[f"{ATTENTION}kv_proj.weight"], torch.stack(both).mean(0))
    assert not made[f"{ATTENTION}experts.bias"].any()
    assert not made["model.layers.1.mlp.bias"].any()
    dense = load(tmp_path / "d0")  # the average, with the blocks and attention of the second model
    state = {n: torch.stack([m[n] for m in own]).mean(0) for n in own[0]}
    special = [n for n in state if ".mlp." in n or "q_proj" in n or "o_proj" in n]
    dense.load_state_dict(state | {n: own[1][n] for n in special})
    model = load(folder)
    for router in find_routers(model).values():
        router.layer.weight.data[[0, 2]] = 0.0
        router.register_forward_hook(lambda _m, args, _out: _all_to(1, args[0]))
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=0)


def _all_to(expert: int, x_TD: torch.Tensor) -> tuple[Any, ...]:
    """The routing of a router that sends every token to one of three experts."""
    tokens = len(x_TD)
    sizes = [tokens if e == expert else 0 for e in range(3)]
    return torch.arange(tokens), torch.arange(tokens), torch.ones(tokens), sizes, torch.zeros(tokens, 3)


@pytest.mark.parametrize("name", sorted(["mlp.input_linear.weight", "mlp.output_linear.weight", "mlp.bias",
                                         "self_attention.experts.input_linear.weight",
                                         "self_attention.experts.output_linear.weight",
                                         "self_attention.experts.bias", "self_attention.kv_proj.weight",
                                         "input_layernorm.weight", "post_attention_layernorm.weight"]))  # fmt: skip
def test_a_change_of_any_tensor_shows(tmp_path: Path, name: str) -> None:
    seed = seed_of(tmp_path / "seed")
    model = load(merge(tmp_path / "moe", [seed] * 3, top_k=3, experts=FORM))
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{name}").view(-1)[:3] += 0.5
    assert (logits(model) - logits(load(seed))).abs().max() > 1e-4


@pytest.mark.parametrize("k", [1, 2, 3])
def test_routing_under_top_k_is_stock_routing_with_its_gradients(tmp_path: Path, k: int) -> None:
    stock, ours = (load(moe_of(tmp_path / str(i), top_k=k)).train() for i in range(2))
    a = stock(input_ids=IDS, labels=IDS).loss
    a.backward()
    with Routed(ours, "top_k", k) as routed:
        b = ours(input_ids=IDS, labels=IDS).loss
        b.backward()
        assert len(routed.layers) == 4
        assert all(layer.index_TK.shape == (IDS.numel(), k) for layer in routed.layers)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for (name, one), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_what_is_recorded_in_evaluation_is_what_the_stock_router_chose(tmp_path: Path) -> None:
    model = load(moe_of(tmp_path))
    with Routed(model, "top_k", 2) as routed:
        torch.testing.assert_close(logits(model), logits(load(tmp_path / "moe")), atol=0, rtol=0)
    for layer in routed.layers:
        best = layer.logits_TE.topk(2, dim=-1).indices
        assert torch.equal(best.sort(-1).values, layer.index_TK.sort(-1).values)
        torch.testing.assert_close(layer.weight_TK, layer.logits_TE.gather(1, layer.index_TK).softmax(-1))


@pytest.mark.parametrize(("rule", "k"), [("switch", 1), ("sample_top1", 1), ("soft", 3)])
def test_other_rules_route_and_train_both_kinds_of_router(tmp_path: Path, rule: str, k: int) -> None:
    model = load(moe_of(tmp_path, top_k=k)).train()
    with Routed(model, rule, k):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for router in find_routers(model).values():
        assert router.layer.weight.grad.abs().max() > 0


def test_the_fresh_routers_have_the_entropy_that_was_asked(tmp_path: Path) -> None:
    model = load(moe_of(tmp_path, 4))
    with Routed(model, "top_k", 2) as routed:
        logits(model)
    shares = [layer.entropy_share for layer in statistics(routed.layers)]
    assert len(shares) == 4
    assert all(0.5 < share < 0.9 for share in shares)  # 0.7 on the input that its norm gives
    assert router_labels(model) == ["0", "0 attention", "1", "1 attention"]


@pytest.mark.parametrize(("trainable", "count"), [("router", 4), ("no_experts", None), ("all", None)])
def test_what_is_trained_is_told_by_modules(tmp_path: Path, trainable: str, count: int | None) -> None:
    model = load(moe_of(tmp_path))
    freeze(model, trainable)
    free = {n for n, p in model.named_parameters() if p.requires_grad}
    experts = {n for n, p in model.named_parameters() if p.ndim == 3}
    if count:
        assert len(free) == count
        assert all("router" in name for name in free)
    else:
        assert free == {n for n, _ in model.named_parameters()} - (experts if trainable == "no_experts" else set())


def test_routers_from_data_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    model = load(moe_of(tmp_path, 2, top_k=1))
    made = fresh_routers(model, {"a": [IDS % 100], "b": [IDS % 90 + 150]}, ["a", "b"], how="activations", entropy=0.9)
    assert len(made) == 4
    assert [name.replace("model.layers.", "") for name in find_routers(model)] == [
        "0.mlp.router", "0.self_attention.experts.router", "1.mlp.router", "1.self_attention.experts.router",
    ]  # fmt: skip


def test_it_is_exported_under_the_names_that_its_class_has(tmp_path: Path) -> None:
    with opened(moe_of(tmp_path)) as source:
        for form in ("published", "fused"):
            assert [row.name for row in rows(source, form)] == list(source.entries)


def test_its_config_states_what_the_class_computes(tmp_path: Path) -> None:
    config = json.loads((moe_of(tmp_path, top_k=2) / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"], config["kv_channels"]) == ("jetmoe", 8, 8)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "olmo2", "granite", "llama"])
def test_seeds_that_no_class_holds_so_are_refused(tmp_path: Path, family: str) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))  # the Llama has grouped-query attention
    with pytest.raises(ArtifactError, match=r"cannot have attention experts: jetmoe.*Use merge\.experts: per_model"):
        merge(tmp_path / "moe", [seed] * 2, top_k=1, experts=FORM)


def test_a_life_after_the_merge_is_refused_and_so_are_kernels(tmp_path: Path) -> None:
    with opened(moe_of(tmp_path)) as checkpoint, pytest.raises(ArtifactError, match="feed-forward experts only"):
        Moe(checkpoint)
    assert kernel_of({"model_type": "jetmoe"}, "auto", torch.device("cpu")) == "eager"
    with pytest.raises(RecipeError, match="loop of its own, not on sorted"):
        kernel_of({"model_type": "jetmoe"}, "sorted", torch.device("cpu"))


def test_copies_and_a_joint_vocabulary_go_with_it(tmp_path: Path) -> None:
    seed = seed_of(tmp_path / "seed", vocab_size=289)
    (tmp_path / "out").mkdir()
    vocabulary = write_joint(tmp_path / "out", seed, {})
    with ExitStack() as stack:
        models: dict[str, Checkpoint] = {n: stack.enter_context(opened(seed)) for n in ("a", "seed")}
        joint = JointVocabulary(vocabulary, models, models["seed"])
        cut = {n: joint.trimmed(m) for n, m in models.items()}
        write_moe(tmp_path / "out", cut, cut["seed"], MergeSettings(experts=FORM, copies={"a": 2}), 2, joint=joint)
    ids = IDS % 289
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, load(seed)(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ({"train.gradient_checkpointing": True}, ("ffn+attention", "no gradient checkpointing")),
        ({"run.kernel": "sorted"}, ("ffn+attention", "run.kernel: auto")),
        ({"merge.layers": [0]}, ("merge:", "all layers")),
        ({"merge.shared_expert": "seed"}, ("merge:", "no shared expert")),
    ],
)
def test_what_its_class_cannot_do_is_refused_at_the_start(world: World, sets: dict[str, Any], words: Any) -> None:
    for folder, noise in ((world.seed, 0.0), (world.law, 0.01)):
        seed_of(folder, noise=noise)
    for key, value in {"merge.experts": FORM, **sets}.items():
        world.set(key, value)
    refused(world.write(), world.runs, 2, words)


def test_wider_and_narrower_blocks_go_with_it(world: World) -> None:
    seed = seed_of(world.seed)
    narrow, wide = load(seed), load(seed_of(world.law, intermediate_size=80))
    state = {n: torch.zeros_like(p) for n, p in wide.state_dict().items()}
    for name, tensor in narrow.state_dict().items():
        state[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    wide.load_state_dict(state)
    wide.save_pretrained(world.law)
    world.set("merge.experts", FORM)
    world.set("domains.math", {"checkpoint": "seed", "data": ["data/math.jsonl"]})
    world.examine()
    graph = graph_of(world.write(), ())
    for step in graph.needed(["merge"]):
        step.build(lambda _event: None)
    merged = load(graph.steps["merge"].folder)
    torch.testing.assert_close(logits(merged), logits(narrow), atol=1e-5, rtol=0)
