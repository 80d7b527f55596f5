"""The training loop against a bare one of the same model."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from btx import model as models
from btx.bench import seconds
from btx.loop import Loop
from btx.settings import RunSettings, TrainSettings
from btx.stream import Stream
from btx.tokens import Tokens

SETTINGS = TrainSettings(sequence_length=256, batch_tokens=4096, learning_rate=1e-3)


def _model() -> Any:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    return models.fresh(LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    ))  # fmt: skip


def _tokens(folder: Path) -> Tokens:
    ids = np.random.default_rng(0).integers(0, 2048, 2**18).astype("<u2")
    ids.tofile(folder / "train.bin")
    (folder / "valid.bin").touch()
    (folder / "tokens.json").write_text('{"dtype": "<u2", "masked": false, "valid": []}')
    return Tokens(folder)


def _bare(stream: Stream, steps: int) -> Callable[[], None]:
    """The shortest loop that trains the same model on the same batches with the same optimiser."""
    net = _model().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)

    def work() -> None:
        for step in range(steps):
            batch = stream.batch(range(step * 16, step * 16 + 16))
            logits = net(input_ids=batch.inputs, use_cache=False).logits
            functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def bench_training(*, steps: int, rounds: int) -> None:
    """Time both in turns on the CPU and print tokens/s and the median ratio (higher is better, 1 is no overhead)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stream = Stream({"x": _tokens(folder)}, weights={"x": 1.0}, sequences=16 * steps, length=256, seed=0)
        bare, ratios, rates = _bare(stream, steps), [], []
        bare()
        for number in range(rounds):
            loop = Loop(
                _model(),
                stream,
                SETTINGS,
                where=RunSettings(device="cpu"),
                work=folder / str(number),
                label="bench",
                tell=lambda _event: None,
            )
            ours, theirs = seconds(loop.run), seconds(bare)
            ratios.append(theirs / ours)
            rates.append(steps * SETTINGS.batch_tokens / ours)
    print(
        f"loop {statistics.median(rates):,.0f} tokens/s; ratio to a bare loop, median of {rounds}: "
        f"{statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})"
    )
