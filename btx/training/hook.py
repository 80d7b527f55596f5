"""What a training may add to the loop: how the finetuning balances routers, how an anchored pair stays frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class TrainingHook:
    """What a step may add to the loop: an extra loss per micro-batch, and figures per step. This one adds nothing."""

    def begin(self, step: int) -> None:
        """Called before each step."""

    def sequences(self, numbers: range, length: int) -> None:
        """Called before each forward pass with the sequences of the run that it computes."""

    def surveys(self, passes: int) -> bool:
        """Whether a step of so many passes first needs all of them without gradients."""
        return False

    def survey(self, share: float) -> None:
        """Called after each pass without gradients, with its share of the step's tokens."""

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """Extra loss, added to the cross-entropy after each forward pass, and figures to log."""
        import torch

        return torch.zeros(()), {}

    def gradients(self) -> None:
        """Called once a step's gradients are complete, before they are clipped."""

    def figures(self) -> dict[str, Any]:
        """Figures of the step for metrics.jsonl."""
        return {}
