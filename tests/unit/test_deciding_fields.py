"""Which fields of a config.json decide what a model computes, and which are idle or the same in another spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from btx.errors import ArtifactError
from btx.models.families import DENSE
from btx.models.native import (
    BALANCE,
    EVENED,
    IDLE,
    ROUTING,
    config_difference,
    declared,
    idle_difference,
    native_config,
)
from tests.support.merges import load, logits, merge
from tests.support.models import FAMILIES, NO_NULL, config_of, save_model

CHANGED: dict[str, Any] = {  # another value of every deciding field, for a family that has it
    "hidden_act": "gelu", "rms_norm_eps": 0.5, "tie_word_embeddings": None, "attention_bias": None, "mlp_bias": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "sliding_window": 7, "use_sliding_window": True,
    "head_dim": 20, "num_key_value_heads": 4, "num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention"], "linear_conv_kernel_dim": 3, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "layer_rope_theta": [77.0, 77.0], "original_max_position_embeddings": 77, "use_bias": None, "conv_bias": None,
    "block_auto_adjust_ff_dim": None, "block_multiple_of": 3, "full_attn_idxs": [0], "conv_L_cache": 5,
    "attention_k_eq_v": None, "hidden_activation": "silu", "use_bidirectional_attention": "all",
    "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 77, "num_kv_shared_layers": 1,
    "use_double_wide_mlp": None, "per_layer_config": {"1": {"head_dim": 4}},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_is_not_idle_decides(family: str) -> None:
    config, carried = config_of(family).to_dict(), DENSE[family].carried
    for field in sorted((declared(config_of(family)) | {*carried}) - IDLE - EVENED - ROUTING - BALANCE):
        value = CHANGED.get(field, 9.5)
        value = [*reversed(config[field])] if field == "layer_types" and value == config[field] else value
        other = {**config, field: not config[field] if value is None else value}
        if field == "use_sliding_window":
            other |= {"layer_types": None, "max_window_layers": 0, "sliding_window": 7}
        if field == "num_hidden_layers":
            other["layer_types"] = None
        if field == "sliding_window" and "use_sliding_window" in config:
            continue  # read only with sliding layers, which use_sliding_window enables
        found = config_difference(config, other, "it", carried=carried)
        assert any(text.startswith(f"{field}: seed ") for text in found), (field, found)


@pytest.mark.parametrize("family", FAMILIES)
def test_idle_fields_do_not_decide(family: str) -> None:
    config = config_of(family).to_dict()
    idle = {
        "attention_dropout": 0.3, "bos_token_id": 5, "eos_token_id": [1, 2], "pad_token_id": 7,
        "initializer_range": 0.9, "max_position_embeddings": 999, "use_cache": False, "pretraining_tp": 3,
        "torch_dtype": "bfloat16", "vocab_size": 999, "intermediate_size": 7, "made_by": "x",
    }  # fmt: skip
    other = {**config, **{k: v for k, v in idle.items() if k in config or k in ("torch_dtype", "made_by")}}
    assert config_difference(config, other, "it", carried=DENSE[family].carried) == []
    said = idle_difference(config, other, "it")
    assert "eos_token_id [1, 2] (seed 0)" in said[0]
    assert "keeps the seed's" in said[0]
    assert idle_difference(config, config, "it") == []


@pytest.mark.parametrize("rope", ["yarn", "dynamic", "longrope", "linear", "llama3"])
def test_positions_decide_where_the_kind_of_rope_reads_them(rope: str) -> None:
    how = {"rope_type": rope, "rope_theta": 5e3, "factor": 2.0, "original_max_position_embeddings": 64}
    how |= {"longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}.get(rope, {})  # fmt: skip
    config = config_of("llama", rope_parameters=how).to_dict()
    found = config_difference(config, {**config, "max_position_embeddings": 256}, "it", carried=())
    assert [f.split(":")[0] for f in found] == ([] if rope in ("linear", "llama3") else ["max_position_embeddings"])


SAME = [
    ({"rope_parameters": None, "rope_theta": 5000.0}, "an old spelling"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000}}, "a whole number"),
    ({"rope_parameters": {"type": "default", "rope_theta": 5000.0, "factor": None}}, "the oldest spelling"),
    ({"head_dim": None}, "what null stands for"),
    ({"hidden_act": "swish"}, "another name of silu"),
]


@pytest.mark.parametrize(("more", "why"), SAME, ids=[why for _, why in SAME])
def test_another_spelling_is_no_difference(more: dict[str, Any], why: str) -> None:
    config = config_of("llama").to_dict()
    assert config_difference(config, {**config, **more}, "it", carried=()) == [], why


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NO_NULL])
def test_a_seed_with_null_key_heads_becomes_the_same_model(tmp_path: Path, family: str) -> None:
    seed = save_model(tmp_path / "seed", config_of(family, num_key_value_heads=4))
    wanted = logits(load(seed))
    config = json.loads((seed / "config.json").read_text())
    (seed / "config.json").write_text(json.dumps({**config, "num_key_value_heads": None}))
    stock = type(config_of(family))(num_attention_heads=4, num_key_value_heads=None).num_key_value_heads
    assert stock == 4
    made = merge(tmp_path / "moe", [seed, seed], top_k=1)
    torch.testing.assert_close(logits(load(made)), wanted, atol=1e-5, rtol=0)


def test_null_key_heads_are_as_many_as_query_heads() -> None:
    from btx.models.families import family_of

    config = {**config_of("llama", num_key_value_heads=4).to_dict(), "num_key_value_heads": None}
    assert family_of(config, "seed", attention=True).moe == "jetmoe"
    assert native_config(config, "seed").num_key_value_heads == 4
    with pytest.raises(ArtifactError, match="grouped-query"):
        family_of(config_of("llama").to_dict(), "seed", attention=True)
