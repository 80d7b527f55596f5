"""One domain's expert: the seed, trained on that domain alone, in a job independent of the others."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from btx.errors import DivergedError, ResourceError
from btx.events import Emit, Note
from btx.graph.artifact import LOGS
from btx.graph.step import Step
from btx.recipe.fields import later
from btx.recipe.settings import ExpertSettings, RunSettings, TrainSettings, steps_of, torch_dtype
from btx.steps.branch import VerifySeed, require_positions
from btx.steps.model import ModelStep
from btx.steps.tokens import TokensStep

if TYPE_CHECKING:
    import torch

    from btx.training.hook import TrainingHook
    from btx.training.loop import Loop, Outcome
    from btx.training.moments import Moments

    Prepare = Callable[[Any, Any], TrainingHook | None]
    Publish = Callable[[Any, Mapping[str, torch.Tensor], Path], None]

OWN = "own"  # the sampler's name for an expert's data: the order depends on it, not on the label


class Train(ModelStep):
    """A dense checkpoint of the seed's shape."""

    kind: ClassVar[str] = "train"
    trains: ClassVar[bool] = True
    branch: VerifySeed
    tokens: TokensStep
    budget: int
    train: ExpertSettings
    part: tuple[int, int] = (0, 1)  # index and number of the experts that share the domain's sequences
    moments: bool = later(False)  # whether the optimiser's moments are published too

    @property
    def needs(self) -> int:
        """Weights, gradients, optimiser state and activations of the seed's shape."""
        return memory_of(self.branch.seed.folder, self.train, self.where)

    @property
    def asks(self) -> dict[str, int]:
        """One sequence for each expert that shares the domain."""
        return {self.tokens.label: self.train.sequence_length * self.part[1]}

    def check(self, asked: int) -> None:
        """RecipeError if a sequence is longer than the seed's max_position_embeddings."""
        require_positions(self.branch.seed, "train.sequence_length", self.train.sequence_length)

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train and save."""
        return fit(
            self, folder=self.branch.seed.folder, like=self.branch.seed.folder, tokens={OWN: self.tokens},
            weights={OWN: 1.0}, budget=self.budget, settings=self.train, out=out, work=work, emit=emit,
            part=self.part, prepare=feed_forward_alone if self.train.trainable == "ffn" else None, keep=self.moments,
        )  # fmt: skip


def feed_forward_alone(model: Any, _stream: Any) -> None:
    """Leave gradients to what becomes experts, and to nothing else: the feed-forward blocks of a dense model, a
    mixture's experts with their routers."""
    from btx.models.families import DENSE, mixture_family
    from btx.models.family import LAYER
    from btx.models.flops import experts_in
    from btx.moe.hooks import find_routers

    if mixture_family(model.config):
        kept = {id(p) for part in (*experts_in(model), *find_routers(model).values()) for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
        return
    blocks = DENSE[model.config.model_type].feed_forward
    for name, parameter in model.named_parameters():
        match = LAYER.fullmatch(name)
        parameter.requires_grad_(match is not None and match[2] in blocks)


def memory_of(folder: Path, settings: TrainSettings, where: RunSettings) -> int:
    """Estimated memory for training a checkpoint, in bytes."""
    from btx.checkpoints.validate import read_config
    from btx.models import memory
    from btx.models.native import native_config

    return memory.training_memory(native_config(read_config(folder), str(folder)).to_dict(), settings, where).total


def fit(
    step: Step, *, like: Path, tokens: dict[str, TokensStep], weights: dict[str, float], budget: int,
    settings: TrainSettings, out: Path, work: Path, emit: Emit, folder: Path | None = None, config: Any = None,
    prepare: Prepare | None = None, part: tuple[int, int] = (0, 1), experts_per_token: int | None = None,
    moments: Moments | None = None, keep: bool = False, publish: Publish | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a model, from a checkpoint folder or from random weights of a config, and write it; returns the facts.

    `prepare(model, stream)` may freeze parameters, add some and return a hook. The optimiser starts from `moments`, if
    there are any, and with `keep` its own are written too. What is written is the whole model, with the tokenizer's
    files of `like`, unless `publish(model, state, out)` writes something else.
    """
    import torch

    from btx.checkpoints.reader import Checkpoint
    from btx.data.packed import Tokens
    from btx.data.sampler import Stream
    from btx.models import flops, model
    from btx.models.families import mixture_family
    from btx.models.kernels import kernel_of
    from btx.moe.hooks import route_in_float32
    from btx.training.loop import Loop

    model.set_threads(step.where)
    device = model.device_of(step.where)
    torch.manual_seed(settings.seed)
    net = (
        model.load(folder, where=step.where, experts_per_token=experts_per_token)
        if folder
        else model.fresh(config, where=step.where)
    )
    dtype = torch_dtype(settings.dtype, Checkpoint(folder).dtype if folder else torch.float32)
    count = steps_of(budget, settings) * (settings.batch_tokens // settings.sequence_length)
    stream = Stream({n: Tokens(t.folder) for n, t in tokens.items()}, weights=weights, sequences=count,
                    length=settings.sequence_length, seed=settings.seed, part=part)  # fmt: skip
    if mixture_family(net.config):
        route_in_float32(net)
    hook = prepare(net, stream) if prepare else None
    kernel = kernel_of(net.config, step.where.kernel, device)
    if kernel:
        emit(Note(step.label, f"experts run on the kernel {kernel} (run.kernel: {step.where.kernel})"))
    loop = Loop(net, stream, settings, where=step.where, work=work, label=step.label, emit=emit, hook=hook,
                moments=moments)  # fmt: skip
    emit(Note(step.label, f"computes in {loop.precision} on {device}"))
    with closing(loop):
        outcome = _ran(loop)
        state = loop.state_dict()
        require_finite(step.label, outcome.loss, state, dtype)
        if loop.accelerator.is_main_process:
            if publish:
                publish(net, state, out)
            else:
                model.save(out, config=net.config, state=state, dtype=dtype, like=like)
            if keep:
                loop.save_moments(out)
            (out / LOGS).mkdir()
            shutil.copyfile(work / "metrics.jsonl", out / LOGS / "metrics.jsonl")
        loop.accelerator.wait_for_everyone()
    spent = flops.training_flops(net.config.to_dict(), outcome.tokens)
    return {**asdict(outcome), "kernel": kernel, "training_flops": spent, "parameters": model.count_parameters(net)}


def _ran(loop: Loop) -> Outcome:
    """The loop, run to its end; ResourceError where memory does not suffice."""
    import torch

    try:
        return loop.run()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{loop.label} ran out of memory on {loop.accelerator.device}. Set run.micro_batch to a smaller number "
            "(the result stays the same but for rounding), or gradient_checkpointing: true."
        ) from error


def require_finite(label: str, loss: float, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """DivergedError if no step had a finite loss, or a weight is NaN or infinite in the dtype that is written.

    Fewer steps than `max_bad_steps` may all be skipped, and no loss has seen the last update.
    """
    from btx.checkpoints.reader import count_non_finite

    if not math.isfinite(loss):
        raise DivergedError(
            f"{label}: none of its steps had a finite loss and gradient. Lower its learning rate, or that of the "
            "training before it."
        )
    for name, tensor in state.items():
        if bad := count_non_finite(tensor.to(dtype)):
            raise DivergedError(
                f"{label}: after the last step {name} holds {bad} values that are NaN or infinite in "
                f"{str(dtype).removeprefix('torch.')}. Lower the learning rate."
            )
