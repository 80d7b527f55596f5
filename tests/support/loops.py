"""Trainings of pico models, whole and stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from btx.data.packed import Tokens
from btx.data.sampler import Stream
from btx.recipe.settings import FinetuneSettings, RunSettings, TrainSettings
from btx.steps.finetune import Balanced
from btx.training.loop import Loop
from tests.support.models import config_of

SETTINGS = {"sequence_length": 16, "batch_tokens": 64, "learning_rate": 1e-2, "precision": "fp32"}


WHERE = RunSettings(device="cpu", threads=1)


def stream(folder: Path, *, steps: int = 8, masked: bool = False) -> Stream:
    """Random tokens of 300 ids."""
    folder.mkdir(exist_ok=True)
    chance = np.random.default_rng(0)
    chance.integers(0, 300, 2000).astype("<u2").tofile(folder / "train.bin")
    (folder / "valid.bin").touch()
    if masked:
        (chance.random(2000) < 0.5).astype("u1").tofile(folder / "train.mask")
    (folder / "tokens.json").write_text(f'{{"dtype": "<u2", "masked": {str(masked).lower()}, "valid": []}}')
    return Stream({"x": Tokens(folder)}, weights={"x": 1.0}, sequences=4 * steps, length=16, seed=0)


def model_of(kind: str) -> Any:
    """A pico dense or MoE model with fixed weights."""
    torch.manual_seed(3)
    if kind == "dense":
        return AutoModelForCausalLM.from_config(config_of("llama"))
    config = config_of("llama").to_dict()
    config.pop("model_type")
    from transformers import MixtralConfig

    top_k = 1 if kind in ("switch", "sample_top1") else 3 if kind == "soft" else 2
    return AutoModelForCausalLM.from_config(
        MixtralConfig(**{**config, "num_local_experts": 3, "num_experts_per_tok": top_k})
    )


def loop_of(
    kind: str, folder: Path, work: str, *, where: RunSettings = WHERE, masked: bool = False, **more: Any
) -> Loop:
    """A loop over a fresh model."""
    model, watch = model_of(kind), None
    if kind == "dense":
        settings = TrainSettings(**{**SETTINGS, **more})
    else:
        settings = FinetuneSettings(**{**SETTINGS, **more}, routing=kind, tokens=512)
        watch = Balanced(model, settings, "x", lambda _e: None, list("abcdefgh"))
    return Loop(
        model,
        stream(folder / "data", masked=masked),
        settings,
        where=where,
        work=folder / work,
        label="x",
        emit=lambda _e: None,
        hook=watch,
    )


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    """The trained weights, copied."""
    return {n: t.clone() for n, t in loop.state_dict().items()}


def stop_after(loop: Loop, steps: int) -> None:
    """Make a loop save its state after some steps and end as if killed then."""
    inner = loop._one_step
    count = [0]

    def one_step() -> dict[str, Any]:
        if count[0] == steps:
            raise KeyboardInterrupt
        count[0] += 1
        return inner()

    loop._one_step = one_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
