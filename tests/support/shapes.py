"""Configs of pico models of every family, dense and sparse, and of one published model."""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

PICO = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 51, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DENSE = (
    "llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_5_text", "olmo2", "granite", "granite_swa", "ernie4_5",
    "hunyuan_v1_dense", "cohere2", "lfm2", "gemma4_text",
)  # fmt: skip
SPARSE = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "flex_olmo", "granitemoe", "granitemoe_swa",
    "ernie4_5_moe", "hunyuan_v1_moe", "cohere2_moe", "lfm2_moe", "gemma4_moe", "jetmoe",
)  # fmt: skip
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen2_moe": {"num_experts": 5, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 12},
    "qwen3_5_moe_text": {"num_experts": 5, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "flex_olmo": {"num_experts": 5},
    "granitemoe": {"num_local_experts": 5},
    "granitemoe_swa": {"num_local_experts": 5},
    "ernie4_5_moe": {
        "moe_num_experts": 5,
        "moe_intermediate_size": 12,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
    },
    "hunyuan_v1_moe": {"num_experts": 5},
    "cohere2_moe": {"num_experts": 5, "first_k_dense_replace": 0},
    "lfm2_moe": {"num_experts": 5, "moe_intermediate_size": 12, "num_dense_layers": 0, "use_expert_bias": False},
    "gemma4_moe": {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 12, "enable_moe_block": True},
    "jetmoe": {"num_local_experts": 5, "kv_channels": 12, "tie_word_embeddings": False},
}
LINEAR = {  # layers of linear attention around one of attention
    "full_attention_interval": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
TOP_K = {"gemma4_moe": "top_k_experts"}  # fields with the experts per token that have a name of their own
OWN = {  # fields that a family needs beside the common ones
    "qwen3_5": LINEAR, "hunyuan": {"head_dim": 8}, "ernie4_5": {"head_dim": 8},
    "cohere2_moe": {"head_dim": 8, "logit_scale": 1.0},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "gemma4": {"head_dim": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "global_head_dim": 16, "hidden_size_per_layer_input": 6,
               "vocab_size_per_layer_input": 51},
}  # fmt: skip
LLAMA2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


SUMMED = ("qwen2_moe", "qwen3_moe", "flex_olmo")  # types whose routing weights add up to one if their config says so
VARIANTS: dict[str, dict[str, Any]] = {  # further mixtures that people have, by name: their type and what is special
    "qwen2_moe beside dense layers": {"model_type": "qwen2_moe", "mlp_only_layers": [0]},
    "qwen3_moe in every second layer": {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
    "qwen2_moe whose weights add up to less than one": {"model_type": "qwen2_moe", "norm_topk_prob": False},
    "ernie4_5_moe with shared experts": {
        "model_type": "ernie4_5_moe",
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 2,
    },
    "lfm2_moe with a bias": {"model_type": "lfm2_moe", "num_dense_layers": 1, "use_expert_bias": True},
    "cohere2_moe of sigmoids": {
        "model_type": "cohere2_moe", "expert_selection_fn": "sigmoid", "num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
}  # fmt: skip


def sparse_config(name: str, **changes: Any) -> Any:
    """The config of a pico mixture of a type or of `VARIANTS`, for the tokenizer of pico models."""
    variant = {"model_type": name, **VARIANTS.get(name, {})}
    kind = variant.pop("model_type")
    own = next((more for start, more in OWN.items() if kind.startswith(start)), {})
    values = {**PICO, **own, **MOE[kind], TOP_K.get(kind, "num_experts_per_tok"): 2, **variant, **changes}
    values |= {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    values = {"norm_topk_prob": True, **values} if kind in SUMMED else values
    values |= {"vocab_size_per_layer_input": 300} if "vocab_size_per_layer_input" in values else {}
    return AutoConfig.for_model(kind.replace("gemma4_moe", "gemma4_text"), **values)


def build(model_type: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A pico model and its config as `save_pretrained` writes it."""
    settings = PICO | next((more for kind, more in OWN.items() if model_type.startswith(kind)), {})
    settings |= (MOE[model_type] | {"num_experts_per_tok": 2} if model_type in MOE else {}) | changes
    kind = model_type.replace("gemma4_moe", "gemma4_text")  # one class for both
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return model, json.loads(model.config.to_json_string())
