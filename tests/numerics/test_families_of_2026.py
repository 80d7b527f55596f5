"""What is particular to a family: joined projections, other widths, shared keys, scales; each exact, or refused."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from btx.checkpoints.reader import opened
from btx.errors import ArtifactError
from btx.merge.canonical import opened_canonical
from btx.merge.padded import same_width
from btx.merge.write import write_average, write_moe
from btx.models.families import family_of, feed_forward_width
from btx.models.family import DOWN, GATE, KEY, QUERY, UP, VALUE
from btx.recipe.merge_settings import MergeSettings
from btx.steps.train import feed_forward_alone
from tests.support.merges import IDS, load, logits, merge
from tests.support.models import config_of, save_model
from tests.support.world import edit_json

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}


def exact(tmp_path: Path, family: str, **more: Any) -> Any:
    """The config of three copies of a seed, which give its logits, opened as the merge does."""
    seed = save_model(tmp_path / "seed", config_of(family, **more))
    (tmp_path / "moe").mkdir()
    with ExitStack() as stack:
        models = same_width({name: stack.enter_context(opened_canonical(seed)) for name in "abc"})
        write_moe(tmp_path / "moe", models, models["a"], MergeSettings(), 2)
    made = load(tmp_path / "moe")
    torch.testing.assert_close(logits(made), logits(load(seed)), atol=1e-5, rtol=0)
    return made.config


@pytest.mark.parametrize("original", [32, 64])
def test_phi3_keeps_its_longrope_below_and_beyond_the_length_it_was_trained_on(tmp_path: Path, original: int) -> None:
    config = exact(tmp_path, "phi3", rope_parameters=LONG, original_max_position_embeddings=original)
    assert config.rope_parameters["rope_type"] == "longrope"


def test_phi3_that_rotates_parts_of_its_heads_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    seed = save_model(tmp_path / "seed", config_of("phi3", rope_parameters=rope))
    with pytest.raises(ArtifactError, match=r"partial_rotary_factor = 0.5, and mixtral rotates whole heads"):
        merge(tmp_path / "moe", [seed] * 2, top_k=1)


def test_parts_of_a_joined_tensor_are_its_rows(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("phi3"))
    stored = load_file(seed / "model.safetensors")
    both = stored["model.layers.1.mlp.gate_up_proj.weight"]
    heads = stored["model.layers.1.self_attn.qkv_proj.weight"]
    with opened_canonical(seed) as found:
        parts = {kind: found.read(f"model.layers.1.{kind}") for kind in (GATE, UP, QUERY, KEY, VALUE)}
        assert torch.equal(torch.cat(list(found.blocks(f"model.layers.1.{UP}", size=7))), both[48:].flatten())
    assert torch.equal(torch.cat([parts[GATE], parts[UP]]), both)
    assert [len(parts[kind]) for kind in (QUERY, KEY, VALUE)] == [32, 16, 16]
    assert torch.equal(torch.cat([parts[kind] for kind in (QUERY, KEY, VALUE)]), heads)
    stored["model.layers.1.self_attn.qkv_proj.weight"] = heads[:-1].contiguous()
    save_file(stored, seed / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"has 63 rows, by config.json it should have 64"), opened_canonical(seed):
        pass


@pytest.mark.parametrize("family", ["phi3", "lfm2"])
def test_an_average_has_the_tensors_of_its_models_and_their_means(tmp_path: Path, family: str) -> None:
    folders = [save_model(tmp_path / str(n), config_of(family), noise=0.1 * n) for n in range(2)]
    (tmp_path / "average").mkdir()
    with ExitStack() as stack:
        models = {str(n): stack.enter_context(opened_canonical(f)) for n, f in enumerate(folders)}
        write_average(tmp_path / "average", models, models["0"], MergeSettings())
    one, other, found = (load_file(f / "model.safetensors") for f in (*folders, tmp_path / "average"))
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("family", "count"), [("phi3", 4), ("lfm2", 6), ("llama", 6)])
def test_feed_forward_blocks_train_alone_under_whatever_names(family: str, count: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_of(family))
    feed_forward_alone(model, None)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == count
    assert all(".mlp." in name or ".feed_forward." in name for name in trained)


@pytest.mark.parametrize("multiplier", [1.0, 1.5])
def test_the_width_of_lfm2_is_the_one_that_its_class_computes(tmp_path: Path, multiplier: float) -> None:
    more = {"block_auto_adjust_ff_dim": True, "block_multiple_of": 16, "block_ffn_dim_multiplier": multiplier}
    config = exact(tmp_path, "lfm2", intermediate_size=50, **more)
    with opened(tmp_path / "seed") as seed:
        width = seed.entries["model.layers.0.feed_forward.w1.weight"].shape[0]
        assert feed_forward_width(seed.config, "seed") == width == config.moe_intermediate_size != 50


def test_the_mixture_of_gemma_4_holds_shared_keys_and_their_wider_blocks(tmp_path: Path) -> None:
    more = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2, "use_double_wide_mlp": True}  # fmt: skip
    config = exact(tmp_path, "gemma4_text", **more)
    assert (config.moe_intermediate_size, config.intermediate_size) == (96, 128)
    assert not config.use_double_wide_mlp


def test_the_mixture_of_gemma_4_holds_keys_that_are_values(tmp_path: Path) -> None:
    exact(tmp_path, "gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=1)


def test_a_mixture_that_was_made_here_is_a_seed_too_though_its_class_is_the_dense_one(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("gemma4_text"))
    made = merge(tmp_path / "moe", [seed] * 2, top_k=2)
    again = merge(tmp_path / "again", [made] * 2, top_k=2, router="own")
    assert load(again).config.num_experts == load(again).config.top_k_experts == 4
    torch.testing.assert_close(logits(load(again)), logits(load(seed)), atol=1e-5, rtol=0)


def test_a_hunyuan_seed_keeps_a_rope_of_its_own(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
    plain = logits(load(save_model(tmp_path / "plain", config_of("hunyuan_v1_dense"))))
    exact(tmp_path, "hunyuan_v1_dense", rope_parameters=rope)
    assert (logits(load(tmp_path / "seed")) - plain).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "tensor"), [("glm4", "post_mlp_layernorm"), ("exaone4", "post_feedforward_layernorm")]
)
def test_what_has_no_exact_class_is_refused_by_the_tensor_in_the_way(kind: str, tensor: str) -> None:
    with pytest.raises(ArtifactError, match=tensor):
        family_of({"model_type": kind}, "seed")


def test_a_seed_of_attention_sinks_needs_them(tmp_path: Path) -> None:
    """granite_swa's layers without positions and its sinks are in the mixture; without them it computes otherwise."""
    exact(tmp_path, "granite_swa")
    edit_json(tmp_path / "moe" / "config.json", layer_rope_theta=[5000.0, 5000.0])
    assert (logits(load(tmp_path / "moe")) - logits(load(tmp_path / "seed"))).abs().max() > 1e-4


def test_a_mixture_of_gemma_4_learns_in_its_experts_and_nowhere_in_the_idle_block(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("gemma4_text"))
    other = save_model(tmp_path / "other", config_of("gemma4_text"), noise=0.1)
    model = load(merge(tmp_path / "moe", [seed, other], top_k=2)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    named = dict(model.named_parameters())
    for kind in (GATE, UP, DOWN):
        assert not named[f"model.layers.0.{kind}"].grad.any()
    for name in ("experts.gate_up_proj", "experts.down_proj", "router.proj.weight", "router.per_expert_scale"):
        assert named[f"model.layers.0.{name}"].grad.any(), name
