"""Moves a policy by trl's GRPOTrainer, saves its state as any training's, and goes on from it to the same bytes.

trl decides the loss, the advantages and the KL term. Sampling, rewards, the order of items and the learning rate are
btx's own, each a function of the step: trl's sampler forgets its epoch when it resumes. Its checkpoints (weights,
optimiser, schedule, random states) are published like other states, so that a damaged one is never resumed from.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from btx.errors import InterruptedRunError, ResourceError
from btx.events import Emit, Note, Trained
from btx.graph.artifact import STATES, publish, verify
from btx.models.memory import sequences_per_pass
from btx.models.model import device_of
from btx.models.opened import Stock
from btx.recipe.settings import RunSettings
from btx.rl.policy import Policy
from btx.rl.sampling import seed_of
from btx.signals import Stop
from btx.training.loop import groups
from btx.training.schedule import learning_rate
from btx.training.state import newest

METRICS = "policy.jsonl"  # not metrics.jsonl, whose losses are cross-entropies and drawn together


def require_trl() -> None:
    """ResourceError, with the remedy, if trl cannot be imported."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of rollout_func
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"grpo needs trl, which cannot be imported ({error}). Install it: pip install 'btx[rl]'."
        ) from error


def train(
    net: Any, tokenizer: Any, policy: Policy, *, where: RunSettings, work: Path, label: str, emit: Emit
) -> dict[str, Any]:
    """Train a model in place to the last step; the facts. InterruptedRunError, its state saved, on a signal."""
    from datasets import Dataset
    from trl import GRPOTrainer

    settings, started = policy.settings, time.monotonic()
    slots = [str(slot) for slot in range(settings.steps * settings.prompts)]
    with Stop() as stop, warnings.catch_warnings():
        # Newer transformers rename what trl still calls by its old name.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        along = Along(net, policy, stop, where=where, work=work, label=label, emit=emit)
        trainer = GRPOTrainer(
            model=net, reward_funcs=along.rewards, args=arguments(policy, where, work, type(net)),
            train_dataset=Dataset.from_dict({"prompt": slots}), processing_class=tokenizer, callbacks=[along],
            rollout_func=along.rollout, optimizers=optimisers(net, policy, where),
        )  # fmt: skip
        for callback in ("PrinterCallback", "ProgressCallback"):
            _without(trainer, callback)
        folder = newest(work)
        if folder:
            policy.load(folder)
        along.resumed(folder)
        trainer.train(resume_from_checkpoint=str(folder) if folder else None)
        done = trainer.state.global_step
        if done < settings.steps:
            raise InterruptedRunError(
                f"{label} was asked to stop ({stop.asked}); its state at step {done} is saved. Run the same command "
                "again to go on."
            )
    along.look(done)
    return {
        "steps": done, "tokens": int(trainer.state.num_input_tokens_seen), "loss": along.loss,
        "device": str(net.device), "precision": "bf16" if trainer.args.bf16 else "fp32", "processes": 1,
        "resumed_from": along.first, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def _without(trainer: Any, name: str) -> None:
    """Take a callback that prints out of a trainer."""
    for one in [one for one in trainer.callback_handler.callbacks if type(one).__name__ == name]:
        trainer.remove_callback(one)


def arguments(policy: Policy, where: RunSettings, work: Path, architecture: type) -> Any:
    """trl's settings of a run in one process; the gradient of the KL term is the unbiased one.

    The reference of that term is loaded as `architecture`, which the seed's config need not name.
    """
    from trl import GRPOConfig

    settings, cpu = policy.settings, device_of(where).type == "cpu"
    size = _passes(settings.group, sequences_per_pass(settings.training, where))
    return GRPOConfig(
        output_dir=str(work / "trl"), use_cpu=cpu, bf16=settings.precision == "bf16" and not cpu, seed=settings.seed,
        max_steps=settings.steps, per_device_train_batch_size=size, gradient_accumulation_steps=settings.group // size,
        num_generations=settings.generations, max_completion_length=settings.task.max_new_tokens,
        temperature=settings.temperature, shuffle_dataset=False, beta=settings.kl, loss_type=settings.loss,
        use_bias_correction_kl=True, scale_rewards=settings.scale_rewards, max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing, router_aux_loss_coef=0.0,
        learning_rate=settings.learning_rate, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, logging_nan_inf_filter=False,
        model_init_kwargs={"architecture": architecture} if settings.kl else None,
    )  # fmt: skip


def _passes(count: int, most: int) -> int:
    """The largest part of `count`, at most `most`, that divides it."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


def optimisers(net: Any, policy: Policy, where: RunSettings) -> tuple[Any, Any]:
    """AdamW and the schedule of every other training here."""
    settings = policy.settings
    net.to(device_of(where))
    optimizer = torch.optim.AdamW(
        groups(net, settings.weight_decay), lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon
    )
    peak = settings.learning_rate
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, steps=settings.steps, settings=settings.training) / peak
    )


class Along(TrainerCallback):  # type: ignore[misc]
    """What happens beside the steps: random states, held-out items, marks, saved states, metrics, signals."""

    def __init__(
        self, net: Any, policy: Policy, stop: Stop, *, where: RunSettings, work: Path, label: str, emit: Emit
    ) -> None:  # fmt: skip
        self.net, self.policy, self.stop, self.where, self.work = net, policy, stop, where, work
        self.label, self.emit = label, emit
        self.first, self.loss, self.saved = 0, float("nan"), time.monotonic()
        self.seen, self.at = 0, time.monotonic()  # tokens, and when they were counted

    # ---- what trl calls ----

    def rollout(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Prompts, which are slots, to ids and completions."""
        with Evaluating(self.net):
            asked, made = self.policy.rollout(Stock(self.net), [int(one) for one in prompts], trainer.state.global_step)
        return {"prompt_ids": asked, "completion_ids": made, "logprobs": None}

    def rewards(self, prompts: Sequence[str], **_more: Any) -> list[float]:
        """The rewards of the latest rollout."""
        assert len(self.policy.rewards) == len(prompts)
        return self.policy.rewards

    def on_step_begin(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Look and mark where it is due, then draw as this step does."""
        settings, step = self.policy.settings, state.global_step
        self.look(step)
        if step and settings.mark_every and step % settings.mark_every == 0:
            with Evaluating(self.net):
                found = self.policy.mark(Stock(self.net), step)
            self.emit(Note(self.label, f"step {step}: items by band {found}"))
        torch.manual_seed(seed_of(settings.seed, "step", step))

    def look(self, step: int) -> None:
        """Ask the held-out items, where that is due and was not done."""
        if str(step) in self.policy.numbers or not self.policy.due(step, self.policy.settings.probe_every):
            return
        with Evaluating(self.net):
            found = self.policy.look(Stock(self.net), step)
        self.emit(Note(self.label, f"step {step}: {found['accuracy']:.3f} of answers to held-out items are right"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Ask for a state where one is due, and stop where that was asked."""
        if state.global_step >= self.policy.settings.steps:
            return
        every = self.where.checkpoint_steps
        late = time.monotonic() - self.saved > 60 * self.where.checkpoint_minutes
        control.should_save = bool(self.stop.asked) or (state.global_step % every == 0 if every else late)
        control.should_training_stop = bool(self.stop.asked)

    def on_save(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Publish what trl saved, with the policy's own state, and drop the older ones."""
        made = Path(args.output_dir) / f"checkpoint-{state.global_step}"

        def produce(out: Path) -> None:
            for file in made.iterdir():
                file.rename(out / file.name)
            self.policy.save(out)

        final = self.work / STATES / f"step-{state.global_step:09d}"
        publish(final, produce, {"step": state.global_step})
        verify(final)
        shutil.rmtree(args.output_dir)
        for older in (self.work / STATES).iterdir():
            if older.name != final.name:
                shutil.rmtree(older)
        self.saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_more: Any) -> None:
        """A line of metrics for every step."""
        if not logs or "loss" not in logs:
            return
        self.loss = logs["loss"] if math.isfinite(logs["loss"]) else self.loss
        now, seen = time.monotonic(), int(state.num_input_tokens_seen)
        speed, self.seen, self.at = (seen - self.seen) / max(now - self.at, 1e-9), seen, now
        with (self.work / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        self.emit(Trained(self.label, state.global_step, self.policy.settings.steps, self.loss, speed))

    def resumed(self, folder: Path | None) -> None:
        """Begin the metrics anew, or after the step of a saved state."""
        self.first = int(folder.name.removeprefix("step-")) if folder else 0
        file = self.work / METRICS
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        file.write_text("".join(f"{one}\n" for one in lines[: self.first]), encoding="utf-8")


class Evaluating:
    """A model in eval mode for a while, as sampling wants it."""

    def __init__(self, net: Any) -> None:
        self.net, self.before = net, net.training

    def __enter__(self) -> None:
        self.net.eval()

    def __exit__(self, *_: object) -> None:
        self.net.train(self.before)
