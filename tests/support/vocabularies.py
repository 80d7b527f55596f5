"""Pico checkpoints whose tokenizer has added tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.models import config_of, save_model

TOKENS = 289  # that the tokenizer of the tests has


def plain(folder: Path, family: str, *, noise: float = 0.0, rows: int = TOKENS) -> Path:
    """A model with the seed's tokenizer."""
    return save_model(folder, config_of(family, vocab_size=rows), noise=noise)


def extended(
    folder: Path, family: str, tokens: list[str], *, noise: float = 0.0, rows: int = 0, before: int = TOKENS,
    special: bool = True,
) -> Path:  # fmt: skip
    """A model with added tokens and embedding rows for them, made with transformers' own methods."""
    plain(folder, family, noise=noise, rows=before)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(tokens, special_tokens=special)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(len(tokens))
    model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[TOKENS:] = 0.1 * torch.randn_like(table[TOKENS:])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
