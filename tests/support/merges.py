"""Merges of pico checkpoints, and the logits of the result."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from btx.checkpoints.reader import carry_files
from btx.merge.canonical import opened_canonical
from btx.merge.write import write_moe
from btx.recipe.merge_settings import MergeSettings

IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def merge(out: Path, folders: list[Path], *, top_k: int, base: int = -1, **settings: Any) -> Path:
    """Merge folders as models m0, m1, ...; the one at `base` is the seed."""
    out.mkdir()
    with ExitStack() as stack:
        models = {f"m{i}": stack.enter_context(opened_canonical(f)) for i, f in enumerate(folders)}
        write_moe(out, models, list(models.values())[base], MergeSettings(**settings), top_k)
    carry_files(folders[0], out)
    return out


def load(folder: Path, implementation: str = "eager") -> Any:
    """A model by its stock class, with no key missing, unexpected or mismatched."""
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True, experts_implementation=implementation
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """Logits on a fixed batch."""
    return model(input_ids=IDS).logits


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """A config's rope scaling, far from its default theta."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 777.0, "factor": 2.0, **more}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


CARRIED = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "all heads have keys": {"num_key_value_heads": 4},
    "one head has keys": {"num_key_value_heads": 1},
    "linear rope": rope("linear"),
    "llama3 rope": rope("llama3", **LLAMA3),
    "yarn rope": rope("yarn", original_max_position_embeddings=64),
    "wide heads": {"head_dim": 20},
    "norm epsilon": {"rms_norm_eps": 0.01},
}


def carried(family: str, what: str) -> dict[str, Any] | None:
    """A change of `CARRIED` in a family's own fields; None where transformers refuses it."""
    changed = CARRIED[what]
    if family == "gemma4_text" and "rope_parameters" in changed:  # one for each kind of layer
        plain = {"rope_type": "default", "rope_theta": 5000.0}
        return {"rope_parameters": {"full_attention": changed["rope_parameters"], "sliding_attention": plain}}
    if family == "phi3" and "rope_parameters" in changed:
        return None
    if what == "norm epsilon":
        name = {"cohere2": "layer_norm_eps", "lfm2": "norm_eps"}.get(family, "rms_norm_eps")
        return {name: 1e-7 if family == "gemma4_text" else 0.01}  # it is exact up to a norm's eps
    return changed
