"""One training loop on accelerate, used by every step that trains.

It knows nothing of domains or experts: a model, a stream of sequences that is a pure function of the step, and an
optional extra loss. Accelerate does devices, sharding and trackers, and autocast where several processes train one
model; the saved state is our own (`btx.training.state`), since resuming must be exact.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from btx.data.sampler import IGNORED, Batch, Stream
from btx.errors import DivergedError, InterruptedRunError, RecipeError
from btx.events import Emit
from btx.models.families import mixture_family
from btx.models.memory import sequences_per_pass
from btx.moe.hooks import find_routers
from btx.recipe.precision import automatic
from btx.recipe.settings import RunSettings, TrainSettings
from btx.signals import Stop
from btx.training.cast_once import CastOnce, embed_in_bfloat16
from btx.training.hook import TrainingHook
from btx.training.loss import cap_of, linear_cross_entropy, output_head, without_head
from btx.training.metrics import Metrics
from btx.training.moments import Moments, write_moments
from btx.training.schedule import learning_rate, micro_batches, share
from btx.training.state import load_state, save_state

WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU")  # accelerate's distributed types that keep the output head unsharded


@dataclass
class Outcome:
    """Summary of a finished training."""

    steps: int
    tokens: int
    loss: float
    bad_steps: int
    seconds: float
    resumed_from: int
    device: str
    processes: int
    precision: str
    epochs: dict[str, float] = field(default_factory=dict)


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: weight decay for matrices, none for vectors (norms, biases)."""
    live = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in live if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in live if p.ndim < 2], "weight_decay": 0.0},
    ]


class Loop:
    """One training, from a fresh or a saved state to its end."""

    def __init__(
        self, model: Any, stream: Stream, settings: TrainSettings, *, where: RunSettings, work: Path, label: str,
        emit: Emit, hook: TrainingHook | None = None, moments: Moments | None = None,
    ) -> None:  # fmt: skip
        from accelerate import Accelerator

        torch.manual_seed(settings.seed)
        self.settings, self.stream, self.where, self.work, self.hook = settings, stream, where, work, hook
        self.label, self.emit = label, emit
        self.batch = settings.batch_tokens // settings.sequence_length
        self.steps = stream.sequences // self.batch
        cpu = where.device == "cpu"
        self.precision = settings.precision if settings.precision != "auto" else automatic(where.device)
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        self.accelerator = Accelerator(
            cpu=cpu, mixed_precision="bf16" if self.precision == "bf16" and not alone else "no",
            log_with=where.report_to or None, project_dir=str(work),
        )  # fmt: skip
        if settings.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            groups(model, settings.weight_decay), lr=settings.learning_rate, betas=settings.betas,
            eps=settings.epsilon, fused=True,
        )  # fmt: skip
        if self.batch % self.accelerator.num_processes:
            raise RecipeError(
                f"batch_tokens gives {self.batch} sequences a step, which {self.accelerator.num_processes} "
                "processes cannot share evenly. Choose a multiple, or fewer processes."
            )
        model.train()
        self.net = model
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if moments:  # now that parameters are on their device
            moments.carry(model, self.optimizer.optimizer)
        whole = self.accelerator.distributed_type.value in WHOLE
        self.head = output_head(model) if whole else None
        self.lookup: Any = None  # the handle of a hook, while the embedding gives bfloat16
        self.cast = self._cast_once(model) if alone else None
        self.step = self.bad = self.bad_in_a_row = 0
        self.loss = float("nan")

    def _cast_once(self, model: Any) -> CastOnce | None:
        """bfloat16 copies of the weights, which a single process uses under bf16 in place of autocast."""
        if self.precision != "bf16":
            return None
        embedding = model.get_input_embeddings()
        self.lookup = embed_in_bfloat16(embedding)
        routers = find_routers(model).values() if mixture_family(model.config) else ()
        precise = [module for module in model.modules() if getattr(module, "in_float32", False)]
        kept = (embedding, *([self.head] if self.head else []), *routers, *precise)
        return CastOnce(model, kept={id(module) for module in kept})

    def run(self) -> Outcome:
        """Train to the end; InterruptedRunError (state saved) on a signal, DivergedError on non-finite steps."""
        started = time.monotonic()
        resumed = self.step = load_state(self.work, self.accelerator, self.model, self.optimizer)
        saved = time.monotonic()
        with (
            Metrics(self.work, label=self.label, total=self.steps, emit=self.emit, loop=self) as metrics,
            Stop() as stop,
        ):
            while self.step < self.steps:
                metrics.record(self._one_step())
                self.step += 1
                asked, due = self._agreed(stop.asked, self._due(saved))
                if self.step < self.steps and (asked or due):
                    save_state(self.work, self.accelerator, self.model, self.optimizer, self.step)
                    saved = time.monotonic()
                if asked and self.step < self.steps:
                    raise InterruptedRunError(
                        f"{self.label} was asked to stop ({asked}); its state at step "
                        f"{self.step} is saved. Run the same command again to go on."
                    )
        if self.lookup:
            self.lookup.remove()  # the weights are float32, and whoever looks at the model computes in that
        return Outcome(
            steps=self.steps,
            tokens=self.steps * self.settings.batch_tokens,
            loss=self.loss,
            bad_steps=self.bad,
            seconds=round(time.monotonic() - started, 1),
            resumed_from=resumed,
            device=str(self.accelerator.device),
            processes=self.accelerator.num_processes,
            precision=self.precision,
            epochs=self.stream.epochs,
        )

    def _agreed(self, asked: str, due: bool) -> tuple[str, bool]:
        """Whether any process was asked to stop, and whether a state is due by the first one's clock.

        Saving is a collective, and signals and clocks reach processes at different steps: all must decide alike.
        """
        if self.accelerator.num_processes == 1:
            return asked, due
        votes = torch.tensor([bool(asked), due and self.accelerator.is_main_process], dtype=torch.float32)
        stop, save = self.accelerator.reduce(votes.to(self.accelerator.device), "sum").tolist()
        return asked or ("a signal to another process" if stop else ""), save > 0

    def _due(self, saved: float) -> bool:
        if self.where.checkpoint_steps:
            return self.step % self.where.checkpoint_steps == 0
        return time.monotonic() - saved > 60 * self.where.checkpoint_minutes

    def _one_step(self) -> dict[str, Any]:
        if self.hook:
            self.hook.begin(self.step)
        rate = learning_rate(self.step, steps=self.steps, settings=self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self._batches()
        with self.cast.step() if self.cast else nullcontext():
            if self.hook and self.hook.surveys(len(batches)):
                self._survey(self.hook, batches)
            total, extra = self._backward(batches, self._learned(batches))
        if self.hook:
            self.hook.gradients()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        figures = {"step": self.step + 1, "loss": total, "grad_norm": float(norm), "learning_rate": rate, **extra}
        if math.isfinite(total) and math.isfinite(figures["grad_norm"]):
            self.optimizer.step()
            self.bad_in_a_row, self.loss = 0, total
        else:
            self._count_bad(figures)
        self.optimizer.zero_grad(set_to_none=True)
        if self.hook:
            figures |= self.hook.figures()
        return figures

    def _batches(self) -> list[Batch]:
        """This process's micro-batches of the step."""
        numbers = range(self.step * self.batch, (self.step + 1) * self.batch)
        size = sequences_per_pass(self.settings, self.where, self.accelerator.num_processes)
        mine = share(numbers, self.accelerator.process_index, self.accelerator.num_processes)
        return [self.stream.batch(part) for part in micro_batches(mine, size)]

    def _learned(self, batches: list[Batch]) -> float:
        """Number of targets with a loss in the whole step, over all processes."""
        if not self.stream.masked:
            return float(self.settings.batch_tokens)
        mine = torch.tensor(float(sum(int((b.targets != IGNORED).sum()) for b in batches)))
        return max(1.0, float(self.accelerator.reduce(mine.to(self.accelerator.device), "sum")))

    def _survey(self, hook: TrainingHook, batches: list[Batch]) -> None:
        """Run all passes of the step without gradients, for losses that need means over the whole step."""
        on = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(on), torch.no_grad():  # the real passes then draw the same dropout
            for batch in batches:
                self._hidden(batch)
                hook.survey(len(batch.inputs) / self.batch)

    def _backward(self, batches: list[Batch], learned: float) -> tuple[float, dict[str, float]]:
        """Sum over micro-batches, so that any cut of the batch gives the same gradient; mean over learned targets."""
        total = torch.zeros((), device=self.accelerator.device)
        extra: dict[str, float] = {}
        for n, batch in enumerate(batches):
            with self._unsynced(n < len(batches) - 1):
                loss = self._cross_entropy(batch) / learned
                total += loss.detach()
                if self.hook:
                    added, seen = self.hook.loss()
                    loss = loss + added * (len(batch.inputs) / self.batch)
                    extra = {k: extra.get(k, 0.0) + v / len(batches) for k, v in seen.items()}
                self.accelerator.backward(loss * self.accelerator.num_processes)
            if self.cast:
                self.cast.collect()
        return float(self.accelerator.reduce(total, "sum")), extra

    def _unsynced(self, wait: bool) -> AbstractContextManager[Any]:
        return self.accelerator.no_sync(self.model) if wait else nullcontext()

    def _hidden(self, batch: Batch) -> Tensor:
        """The output head's input, scaled as logits are; the logits themselves where the head is sharded."""
        if self.hook:
            self.hook.sequences(batch.numbers, batch.inputs.shape[1])
        with without_head(self.net, self.head) if self.head else nullcontext():
            found: Tensor = self.model(input_ids=batch.inputs.to(self.accelerator.device), use_cache=False).logits
        return found

    def _cross_entropy(self, batch: Batch) -> Tensor:
        """Cross-entropy, summed over the targets with a loss."""
        targets = batch.targets.to(self.accelerator.device)
        logits = self._hidden(batch)
        if self.head:
            hidden = logits.to(torch.bfloat16) if self.precision == "bf16" else logits  # float32 under autocast
            return linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.flatten(), cap=cap_of(self.net))
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def _count_bad(self, figures: dict[str, Any]) -> None:
        self.bad += 1
        self.bad_in_a_row += 1
        figures["skipped"] = True
        if self.bad_in_a_row >= self.settings.max_bad_steps:
            raise DivergedError(
                f"{self.label}: {self.bad_in_a_row} steps in a row had a non-finite loss or gradient, up "
                f"to step {self.step + 1} (sequences {self.step * self.batch} to "
                f"{(self.step + 1) * self.batch - 1}). Lower the learning rate or look at that data."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights, whole, by name."""
        return dict(self.accelerator.get_state_dict(self.model))

    def save_moments(self, out: Path) -> None:
        """Write the optimiser's moments, for a later training (`btx.training.moments`); of an unsharded model only."""
        write_moments(out, self.accelerator.unwrap_model(self.model), self.optimizer.optimizer)

    def close(self) -> None:
        """End the trackers, as the last thing; `btx.graph.launch.end_process` leaves the process group as it is.

        Destroying the process group sometimes deadlocks (seen with gloo, in its destructor): all processes then wait.
        """
        if self.accelerator.num_processes == 1:
            self.accelerator.end_training()
        else:
            for tracker in self.accelerator.trackers:
                tracker.finish()
