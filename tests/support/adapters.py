"""Adapters of pico seeds, as peft saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from btx.checkpoints.reader import opened
from btx.checkpoints.writer import write_weights
from btx.merge.adapter import Adapter

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train_adapter(seed: Path, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    """Save a LoRA adapter far from its start; returns the tensors of peft's own merge."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": EVERYWHERE, **more}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(out))
    merged = model.merge_and_unload()
    return {n: t.detach().clone() for n, t in merged.state_dict().items()}


def ours(seed: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """btx's merge of the adapter."""
    out.mkdir()
    with opened(seed) as base:
        found = Adapter(adapter)
        found.require_fit(base)
        write_weights(out, found.rows(base))
    return load_file(out / "model.safetensors")
