"""One tokenizer for the merged model, if experts have added tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from btx.errors import ArtifactError
from btx.events import Emit
from btx.graph.step import Step


class VocabularyStep(Step):
    """A folder with the seed's tokenizer and all added tokens, and vocabulary.json: which model has which."""

    kind: ClassVar[str] = "vocabulary"
    version: ClassVar[int] = 2
    seed: Step
    experts: dict[str, Step]  # those whose tokens or embedding rows differ from the seed's

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Write the joint tokenizer, and verify that it gives the added tokens their ids."""
        from btx.data.packed import load_tokenizer
        from btx.merge.vocabulary import write_joint

        found = write_joint(out, self.seed.folder, {name: step.folder for name, step in self.experts.items()})
        known = load_tokenizer(out).get_vocab()
        for token, number in found.tokens.items():
            if known.get(token) != number:
                raise ArtifactError(
                    f"the tokenizer of {self.seed.folder} does not take the added token {token!r} as its id {number} "
                    f"(it has {known.get(token)}). Leave the expert out, or train it with the seed's tokenizer."
                )
        return {"added": list(found.tokens)}
