"""The mandatory control: the dense seed, continued on all domains for as many tokens as the conversion took in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from btx.graph.step import Step, Tell
from btx.recipe.settings import TrainSettings
from btx.steps.branch import VerifySeed, require_positions
from btx.steps.tokens import TokensStep


class Dense(Step):
    """A dense checkpoint of the seed's shape."""

    kind: ClassVar[str] = "dense"
    trains: ClassVar[bool] = True
    branch: VerifySeed
    tokens: dict[str, TokensStep]
    weights: dict[str, float]
    budget: int
    train: TrainSettings

    @property
    def asks(self) -> dict[str, int]:
        """A sequence of each data that counts."""
        length = self.train.sequence_length
        return {tokens.label: length for name, tokens in self.tokens.items() if self.weights[name]}

    def check(self, asked: int) -> None:
        """Whether the seed has as many positions as a sequence."""
        require_positions(self.branch.seed, "dense.sequence_length", self.train.sequence_length)

    def run(self, out: Path, work: Path, tell: Tell) -> dict[str, Any]:
        """Train and save."""
        from btx.steps.train import fit

        seed = self.branch.seed.folder
        return fit(
            self, folder=seed, like=seed, tokens=self.tokens, weights=self.weights, budget=self.budget,
            settings=self.train, out=out, work=work, tell=tell,
        )  # fmt: skip
