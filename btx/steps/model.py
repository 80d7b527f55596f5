"""Steps that publish a model, and how the published model is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.events import Emit
from btx.graph.step import Step
from btx.recipe.settings import RoutingRule, RunSettings, Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from btx.models.opened import Opened


class ModelStep(Step):
    """Publishes a checkpoint folder that transformers loads, unless a subclass opens it otherwise."""

    @property
    def config(self) -> dict[str, Any]:
        """The published model's config."""
        from btx.checkpoints.validate import read_config

        return read_config(self.folder)

    @contextmanager
    def open(self, *, where: RunSettings, dtype: torch.dtype, rule: RoutingRule | None = None) -> Iterator[Opened]:
        """The published model, opened; `rule` sets how a Mixture of Experts is routed."""
        from btx.models.opened import opened_checkpoint

        with opened_checkpoint(self.folder, where=where, dtype=dtype, rule=rule) as found:
            yield found


class ComposedStep(ModelStep):
    """Publishes a small file that refers to other models, which stay as they are: see `btx/models/composed.py`.

    A subclass declares its settings, and in `combine` how the parts' log-probabilities are combined. One that needs
    more than its settings writes a file in `run` and reads it in `state`. One that is no function of log-probabilities
    overrides `compose`.
    """

    parts: dict[str, ModelStep]  # the composed model has the first part's tokenizer
    settings: Settings

    @classmethod
    def state(cls, folder: Path, settings: Any) -> Any:
        """The first argument of `combine`: the settings, or what `run` wrote into the folder."""
        return settings

    @staticmethod
    def combine(state: Any, log_probs: dict[str, Tensor], ids_BS: Tensor) -> Tensor:
        """Scores (B, K, V) of the next token, as `btx.models.composed.Combine` says."""
        raise NotImplementedError

    @classmethod
    def compose(cls, folder: Path, settings: Any, parts: dict[str, Opened]) -> Opened:
        """The model over its opened parts, by the files in its folder."""
        from btx.models.composed import Composed

        return Composed(parts, partial(cls.combine, cls.state(folder, settings)))

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Write the file, and the tokenizer beside it."""
        from btx.checkpoints.token_map import carry_dense
        from btx.models.composed import describe

        parts = {name: (part.folder, part.digest) for name, part in self.parts.items()}
        describe(out, self.folder, kind=self.kind, parts=parts, settings=self.settings.identity())
        carry_dense(next(iter(self.parts.values())).folder, out)
        return {"parts": list(parts)}

    @contextmanager
    def open(self, *, where: RunSettings, dtype: torch.dtype, rule: RoutingRule | None = None) -> Iterator[Opened]:
        """The composed model over its opened parts."""
        with ExitStack() as stack:
            parts = {n: stack.enter_context(p.open(where=where, dtype=dtype)) for n, p in self.parts.items()}
            yield self.compose(self.folder, self.settings, parts)
