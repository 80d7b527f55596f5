"""Trainings that start from the seed, on the data of several domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from btx.errors import RecipeError
from btx.events import Emit
from btx.recipe.settings import TrainSettings
from btx.steps.branch import VerifySeed, require_positions
from btx.steps.model import ModelStep
from btx.steps.tokens import TokensStep
from btx.steps.train import fit, memory_of


class Continued(ModelStep):
    """The base of steps that train the seed, or something beside its frozen weights."""

    trains: ClassVar[bool] = True
    section: ClassVar[str]  # of the recipe, for messages
    shards: ClassVar[bool] = True  # whether run.launch may share a training out
    branch: VerifySeed
    tokens: dict[str, TokensStep]
    weights: dict[str, float]
    budget: int
    train: TrainSettings

    @property
    def needs(self) -> int:
        """Weights, gradients, optimiser state and activations of the seed's shape; at most, where it is frozen."""
        return memory_of(self.branch.seed.folder, self.train, self.where)

    @property
    def asks(self) -> dict[str, int]:
        """One sequence of each domain with a positive weight."""
        length = self.train.sequence_length
        return {tokens.label: length for name, tokens in self.tokens.items() if self.weights[name]}

    def check(self, asked: int) -> None:
        """RecipeError if a sequence is longer than the seed's max_position_embeddings, or for shards where untried."""
        require_positions(self.branch.seed, f"{self.section}.sequence_length", self.train.sequence_length)
        if self.where.launch and not self.shards:
            raise RecipeError(
                f"{self.section} was not tried on shards, as run.launch may make. Leave it, or run.launch, out."
            )

    def fitted(self, out: Path, work: Path, emit: Emit, **more: Any) -> dict[str, Any]:
        """Train from the seed and save, as `btx.steps.train.fit` does; the facts."""
        seed = self.branch.seed.folder
        return fit(
            self, folder=seed, like=seed, tokens=self.tokens, weights=self.weights, budget=self.budget,
            settings=self.train, out=out, work=work, emit=emit, **more,
        )  # fmt: skip
