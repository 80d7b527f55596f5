"""The training loop compared with bare loops (fp32, autocast, bfloat16 weights) and transformers' Trainer.

All train the same model on the same sequences with the same optimiser; the Trainer's cosine schedule reaches its end,
a tenth of the peak, one step later than the others'. Each runs in its own process, so that peak memory is its own;
rounds are interleaved, so that drift in the machine's speed affects all alike.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from btx.bench import apart, resident

LENGTH = 256
RATE = 1e-3
CONTENDERS = {
    "ours fp32": "the loop of btx, fp32",
    "ours bf16": "the loop of btx, bf16: weights cast once a step, fp32 state",
    "bare fp32": "the shortest loop, fp32",
    "pure bf16": "the shortest loop over bfloat16 weights and moments: no fp32 state, as fast as bf16 gets",
    "autocast": "the shortest loop under autocast over fp32 weights",
    "Trainer": "transformers' Trainer with bf16=True",
}


def bench_training(
    *, model: Path | None, tokens: int, steps: int, rounds: int, names: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Tokens/s (median over rounds, the first step left out), losses of every step and peak memory of each contender.

    `tokens` are per optimiser step; `model` is a checkpoint folder, or None for a small Llama with random weights.
    """
    found: dict[str, Any] = {name: {"rates": [], "memory": 0} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in names:
                say(f"round {number + 1} of {rounds}: {name}")
                about = {"name": name, "model": str(model or ""), "tokens": tokens, "steps": steps, "folder": folder}
                row = apart("btx.bench.training", about)
                found[name]["rates"].append(row["rate"])
                found[name]["losses"] = row["losses"]
                found[name]["memory"] = max(found[name]["memory"], row["memory"])
    for name, row in found.items():
        row["rate"] = statistics.median(row["rates"])
        row["what"] = CONTENDERS[name]
    return found


def table(found: dict[str, Any]) -> Any:
    """One row per contender, with speed ratios to pure bf16, bare fp32 and Trainer where those ran."""
    from rich.table import Table

    drawn = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("loop", "tokens/s", "to pure bf16", "to fp32", "to Trainer", "memory", "loss"):
        drawn.add_column(column, justify="left" if column == "loop" else "right", no_wrap=True)
    for name, row in found.items():
        ratios = [
            f"{row['rate'] / found[other]['rate']:.3f}" if other in found else ""
            for other in ("pure bf16", "bare fp32", "Trainer")
        ]
        drawn.add_row(name, f"{row['rate']:,.0f}", *ratios, f"{row['memory'] / 1e9:.2f} GB", f"{row['losses'][-1]:.3f}")
    return drawn


def run(about: dict[str, Any]) -> dict[str, Any]:
    """Train as a contender does; returns tokens/s, losses and peak memory in bytes: of the GPU or of this process."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = _model(about["model"])
    steps, tokens = about["steps"], about["tokens"]
    ids = _sequences(steps * tokens // LENGTH, net.config.vocab_size)
    kind = {"Trainer": _trainer}.get(about["name"], _ours if about["name"].startswith("ours") else _bare)
    losses, seconds = kind(net, ids, about)
    return {
        "rate": (steps - 1) * tokens / seconds,
        "losses": [round(x, 4) for x in losses],
        "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM"),
    }


def _model(folder: str) -> Any:
    import torch
    from transformers import LlamaConfig

    from btx.models import model
    from btx.recipe.settings import RunSettings

    torch.manual_seed(0)
    if folder:
        return model.load(Path(folder), where=RunSettings()).to(model.device_of(RunSettings()))
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    net = model.fresh(config, where=RunSettings())
    return net.to(model.device_of(RunSettings()))


def _sequences(count: int, vocabulary: int) -> np.ndarray[Any, Any]:
    """Ids (count, LENGTH + 1) from a fixed transition rule with noise, so that the loss can fall."""
    chance = np.random.default_rng(0)
    ids = chance.integers(0, vocabulary, (count, LENGTH + 1))
    for place in range(1, LENGTH + 1):
        follows = chance.random(count) < 0.8
        ids[follows, place] = (7 * ids[follows, place - 1] + 1) % vocabulary
    return ids


def _ours(net: Any, ids: np.ndarray[Any, Any], about: dict[str, Any]) -> tuple[list[float], float]:
    from btx.data.packed import Tokens
    from btx.data.sampler import Batch, Stream
    from btx.recipe.settings import RunSettings, TrainSettings
    from btx.training.loop import Loop

    folder = Path(tempfile.mkdtemp(dir=about["folder"]))
    ids[:, :-1].astype("<u4").tofile(folder / "train.bin")
    (folder / "valid.bin").touch()
    (folder / "tokens.json").write_text('{"dtype": "<u4", "masked": false, "valid": []}')
    settings = TrainSettings(
        sequence_length=LENGTH, batch_tokens=about["tokens"], learning_rate=RATE, warmup_steps=0,
        precision=about["name"].split()[1],
    )  # fmt: skip
    stream = Stream({"x": Tokens(folder)}, weights={"x": 1.0}, sequences=len(ids), length=LENGTH, seed=0)
    stream.batch = lambda numbers: Batch(*_batch(ids, numbers), numbers)  # type: ignore[method-assign]
    loop = Loop(net, stream, settings, where=RunSettings(), work=folder / "work", label="bench",
                emit=lambda _event: None)  # fmt: skip
    started: list[float] = []
    inner = loop._one_step

    def step() -> dict[str, Any]:
        found = inner()
        started.append(time.monotonic())
        return found

    loop._one_step = step  # type: ignore[method-assign]
    loop.run()
    lines = (folder / "work/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], started[-1] - started[0]


def _batch(ids: np.ndarray[Any, Any], numbers: range) -> tuple[Any, Any]:
    import torch

    rows = torch.from_numpy(ids[numbers.start : numbers.stop])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _bare(net: Any, ids: np.ndarray[Any, Any], about: dict[str, Any]) -> tuple[list[float], float]:
    import torch
    from torch.nn import functional

    from btx.recipe.settings import TrainSettings
    from btx.training.loop import groups
    from btx.training.schedule import learning_rate

    net = net.train().to(torch.bfloat16 if about["name"] == "pure bf16" else torch.float32)
    settings = TrainSettings(learning_rate=RATE, warmup_steps=0)
    optimizer = torch.optim.AdamW(groups(net, 0.1), lr=RATE, betas=settings.betas, eps=1e-8, fused=True)
    rows, losses, times = about["tokens"] // LENGTH, [], []
    for step in range(about["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=about["steps"], settings=settings)
        inputs, targets = (x.to(net.device) for x in _batch(ids, range(step * rows, (step + 1) * rows)))
        with torch.autocast(net.device.type, torch.bfloat16, enabled=about["name"] == "autocast"):
            logits = net(input_ids=inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        times.append(time.monotonic())
    return losses, times[-1] - times[0]


def _trainer(net: Any, ids: np.ndarray[Any, Any], about: dict[str, Any]) -> tuple[list[float], float]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = [{"input_ids": row[:-1], "labels": np.concatenate([[-100], row[1:-1]])} for row in ids]
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Records when each step ends."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Record the time."""
            times.append(time.monotonic())

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=about["folder"]), use_cpu=net.device.type == "cpu", bf16=True,
        max_steps=about["steps"], per_device_train_batch_size=about["tokens"] // LENGTH, learning_rate=RATE,
        weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, dataloader_num_workers=0, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model=net, args=arguments, train_dataset=rows, callbacks=[Clock()])
    trainer._get_train_sampler = lambda *_: None  # None: no shuffling, as in the other loops
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [x for x in losses if math.isfinite(x)], times[-1] - times[0]
