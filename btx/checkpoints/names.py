"""Tensor names that all supported families share, and how checkpoints with a vision tower differ."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from btx.errors import ArtifactError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LAYERS_EMBEDDING = "model.embed_tokens_per_layer.weight"  # of Gemma 4: what every layer adds to its input
BY_TOKEN = (EMBEDDING, LAYERS_EMBEDDING, HEAD)  # with a row for every token

# Model types with a vision tower: that of their language model.
SEEING = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
_LANGUAGE = "model.language_model."  # before its tensors, where transformers saw the whole model
_APART = ("model.visual.", "mtp.")  # the vision tower, and the heads that predict further tokens


def of_language_model(names: Iterable[str], model_type: str) -> dict[str, str]:
    """The tensors of a checkpoint that its causal language model has: their names as stored, by those it gives them."""
    if model_type not in SEEING.values():
        return {name: name for name in names}
    return {name.replace(_LANGUAGE, "model.", 1): name for name in names if not name.startswith(_APART)}


def language_model(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config of the language model in one that sees images too, as AutoModelForCausalLM reads it."""
    text = config.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", SEEING[config["model_type"]]) not in SEEING.values():
        raise ArtifactError(f"{path} has no text_config of a {config['model_type']} model. Fetch the checkpoint again.")
    return {**text, "model_type": SEEING[config["model_type"]]}
