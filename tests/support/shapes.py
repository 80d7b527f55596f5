"""Configs of pico models of every family, dense and sparse, and of one published model."""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

PICO = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 51, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DENSE = ("llama", "mistral", "qwen2", "qwen3", "qwen3_5_text", "olmo2", "granite")
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "flex_olmo", "granitemoe", "jetmoe")
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen2_moe": {"num_experts": 5, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 12},
    "qwen3_5_moe_text": {"num_experts": 5, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "flex_olmo": {"num_experts": 5},
    "granitemoe": {"num_local_experts": 5},
    "jetmoe": {"num_local_experts": 5, "kv_channels": 12, "tie_word_embeddings": False},
}
LINEAR = {  # layers of linear attention around one of attention
    "full_attention_interval": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
LLAMA2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def build(model_type: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A pico model and its config as `save_pretrained` writes it."""
    settings = PICO | (LINEAR if model_type.startswith("qwen3_5") else {})
    settings |= (MOE[model_type] | {"num_experts_per_tok": 2} if model_type in MOE else {}) | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return model, json.loads(model.config.to_json_string())
