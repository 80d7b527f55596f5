"""Shared by all tests: one thread, and pico models built on the spot; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

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
    "olmo2": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.3,
        "tie_word_embeddings": True,
    },
}


def config_of(family: str, **more: Any) -> Any:
    """A pico config of a dense family."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **more})


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
            if name.endswith(".bias"):  # which start at zero
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
        if noise:
            generator = torch.Generator().manual_seed(int(noise * 1e6) + 7)
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    tokenizer_into(folder)
    return folder


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each dense family in turn."""
    return str(request.param)


WORDS = {
    "math": "two plus three is five and seven times six is forty two so the sum of both is forty seven ",
    "code": "def add(a, b): return a + b  # and for x in range(3): print(add(x, x)) while True: break ",
}


def write_corpus(path: Path, domain: str, *, documents: int = 40) -> Path:
    """A JSON-lines file of documents that differ, some of them longer than others."""
    import json
    import random

    chance = random.Random(domain)
    words = WORDS[domain].split()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(chance.choice(words) for _ in range(60 + number))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    return path


RECIPE = """\
name: pico
seed: {checkpoint: seed, data: ["corpora/*.jsonl"]}
domains:
  math: {data: ["corpora/math.jsonl"], tokens: 3072}
  code: {data: ["corpora/code.jsonl"], tokens: 3072}
train: {sequence_length: 64, batch_tokens: 256, learning_rate: 1e-3}
data: {holdout: 0.2}
finetune: {tokens: 1024, top_k: 2}
evaluate: {tokens: 2000, bootstrap: 50}
run: {device: cpu, threads: 1}
"""


def write_project(folder: Path, *, family: str = "llama") -> Path:
    """A pico seed, two corpora and a recipe over them; returns the recipe's path."""
    save_model(folder / "seed", config_of(family))
    for domain in WORDS:
        write_corpus(folder / "corpora" / f"{domain}.jsonl", domain)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture
def world(tmp_path: Path) -> Any:
    """A good recipe and all that it names, to be broken."""
    from tests.faults.world import World

    return World(tmp_path)
