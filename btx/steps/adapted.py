"""A LoRA adapter of the seed, merged into a dense expert."""

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
    """A dense checkpoint: the seed, with every adapted W replaced by W + s B A."""

    kind: ClassVar[str] = "adapted"
    seed: Step
    content: str  # SHA-256 of the adapter's files
    path: Path = execution(Path())

    def check(self, asked: int) -> None:
        """Check the adapter against the seed."""
        if isinstance(self.seed, ExternalCheckpoint):  # a builtin seed does not exist yet
            self.examine()

    def examine(self) -> None:
        """Refuse an adapter that does not fit the seed; reads the whole adapter, writes nothing."""
        from btx.checkpoints.reader import opened
        from btx.merge.adapter import Adapter

        with opened(self.seed.folder) as seed:
            Adapter(self.path).require_fit(seed)

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Check the adapter, add it to the seed, write the checkpoint."""
        from btx.checkpoints.reader import one_thread, opened
        from btx.checkpoints.token_map import carry_dense
        from btx.checkpoints.writer import write_weights
        from btx.merge.adapter import Adapter

        adapter = Adapter(self.path)
        with opened(self.seed.folder) as seed, one_thread():
            adapter.require_fit(seed)
            hashed = write_weights(out, adapter.rows(seed))
            write_json(out / "config.json", seed.config)
        carry_dense(self.seed.folder, out)
        return {"changed": len(adapter.factors) + len(adapter.replaced), HASHED: hashed}
