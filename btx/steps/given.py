"""An existing checkpoint: a seed, or an expert trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from btx.events import Emit
from btx.recipe.fields import execution
from btx.steps.model import ModelStep


class ExternalCheckpoint(ModelStep):
    """A local Hugging Face folder. Its identity is its content; it is read, never written."""

    kind: ClassVar[str] = "given"
    content: str  # SHA-256 of config, tokenizer and weights
    path: Path = execution(Path())
    origin: str | None = execution(None)  # the repository and the commit that it was fetched from

    @property
    def folder(self) -> Path:
        """The folder itself."""
        return self.path

    @property
    def done(self) -> bool:
        """Always."""
        return True

    @property
    def exists(self) -> bool:
        """Always: it was read to find its digest."""
        return True

    @property
    def digest(self) -> str:
        """SHA-256 of its content."""
        return self.content

    def build(self, emit: Emit, *, rank: int = 0) -> None:
        """Nothing to do: the checkpoint exists."""

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Never called."""
        raise AssertionError("a given checkpoint is not built")
