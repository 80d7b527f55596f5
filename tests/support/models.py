"""Pico models built on the spot, with a tokenizer; nothing is downloaded."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


FAMILIES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "mistral": {"sliding_window": 16, "head_dim": 12},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "qwen3_5_text": {
        "head_dim": 16,
        "full_attention_interval": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "olmo2": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.3,
        "tie_word_embeddings": True,
    },
    "granite_swa": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.3,
        "sliding_window": 16,
        "layer_rope_theta": [5000.0, 0],
        "tie_word_embeddings": True,
    },
    "phi3": {"sliding_window": 16},
    "ernie4_5": {"head_dim": 12, "tie_word_embeddings": True},
    "cohere2": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 0.5,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_dense": {"head_dim": 12, "tie_word_embeddings": True},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
}


# Dense families beside whose mixture transformers makes one class of every tokenizer.
OWN_TOKENIZER = {"qwen3_5_text": "qwen3_5_moe_text"}


NO_NULL = ("mistral", "qwen3_5_text", "lfm2", "gemma4_text")  # families that take no null for the key heads


def config_of(family: str, **more: Any) -> Any:
    """A pico config of a dense family."""
    from transformers import AutoConfig

    values = deepcopy({**COMMON, **FAMILIES[family], **more})  # configs change the mappings that they are given
    return AutoConfig.for_model(family, **values)


def tokenizer_into(folder: Path, *, extra: str = "") -> None:
    """A byte-level tokenizer of 300 ids with an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    fast.train_from_iterator(["the quick brown fox jumps over the lazy dog " + extra] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<|end|>", eos_token="<|end|>")
    wrapped.save_pretrained(str(folder))


def save_model(folder: Path, config: Any, *, seed: int = 0, noise: float = 0.0, dtype: Any = torch.float32) -> Path:
    """A checkpoint folder with weights from `seed`, moved by `noise`, with a tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5)
            if name.endswith(".bias") or not parameter.any():  # zeros, as biases start, would hide a mistake
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
            if config.model_type.startswith("gemma4") and ".mlp." in name:  # well above a norm's eps
                parameter.mul_(20.0)
            if name.endswith(".A_log"):  # at its start a state decays within a token, and nothing of it shows
                parameter.sub_(4.0)
        if noise:
            generator = torch.Generator().manual_seed(int(noise * 1e6) + 7)
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    tokenizer_into(folder)
    if config.model_type in OWN_TOKENIZER:
        own_tokenizer(folder, OWN_TOKENIZER[config.model_type])
    return folder


def own_tokenizer(folder: Path, model_type: str) -> None:
    """Save a folder's tokenizer again in the class that transformers has for a model type."""
    from transformers import AutoConfig, AutoTokenizer

    config, end = AutoConfig.for_model(model_type), "<|end|>"  # named, as the class would add marks of its own
    found = AutoTokenizer.from_pretrained(folder, config=config, unk_token=end, eos_token=end, pad_token=end)
    found.save_pretrained(str(folder))
