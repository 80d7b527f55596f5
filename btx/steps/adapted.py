"""A LoRA adapter of the seed, made a dense expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from btx.events import Emit
from btx.graph.artifact import write_json
from btx.graph.step import HASHED, Step
from btx.recipe.fields import execution
from btx.steps.given import ExternalCheckpoint
from btx.steps.model import ModelStep


class MergedLora(ModelStep):
    """A dense checkpoint: the seed with W + s B A in the place of every W that the adapter changes."""

    kind: ClassVar[str] = "adapted"
    seed: Step
    content: str  # SHA-256 of the adapter's files
    path: Path = execution(Path())

    def check(self, asked: int) -> None:
        """Look at the adapter."""
        if isinstance(self.seed, ExternalCheckpoint):  # a builtin one is yet to be made
            self.examine()

    def examine(self) -> None:
        """Refuse an adapter that does not go with the seed; reads it whole, writes nothing."""
        from btx.checkpoints.reader import opened
        from btx.merge.adapter import Adapter

        with opened(self.seed.folder) as seed:
            Adapter(self.path).require_fit(seed)

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Check, add and write."""
        from btx.checkpoints.reader import carry_files, one_thread, opened
        from btx.checkpoints.writer import write_weights
        from btx.merge.adapter import Adapter

        adapter = Adapter(self.path)
        with opened(self.seed.folder) as seed, one_thread():
            adapter.require_fit(seed)
            hashed = write_weights(out, adapter.rows(seed))
            write_json(out / "config.json", seed.config)
        carry_files(self.seed.folder, out)
        return {"changed": len(adapter.factors) + len(adapter.replaced), HASHED: hashed}
