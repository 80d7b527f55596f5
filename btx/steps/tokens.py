"""A domain's documents as packed tokens, the held-out documents separate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from btx.errors import RecipeError
from btx.events import Emit, Warned
from btx.graph.step import Step
from btx.recipe.fields import execution
from btx.recipe.settings import DataSettings

if TYPE_CHECKING:
    from btx.data.packed import Encoder
    from btx.data.split import Split


class Reads(Step):
    """The base of steps that read the training part of some texts."""

    sources: list[str]
    valid: list[str]
    apart: list[str]  # held-out files of other domains, whose documents are not trained on here either
    beside: list[list[str]]  # the sources of other domains that share files with these, and hold out documents of them
    content: list[str]  # digests of sources, valid, apart and beside, in order
    data: DataSettings
    notes: list[str] = execution([])  # warnings from the search for files, emitted when the step runs

    def identity(self) -> dict[str, Any]:
        """The contents of the files decide, not their paths."""
        fields = super().identity()
        fields |= {name: len(getattr(self, name)) for name in ("sources", "valid", "apart")}
        return fields | {"beside": [len(other) for other in self.beside]}

    def split(self) -> Split:
        """The documents, split into training and held-out; to be read once."""
        from btx.data.split import Split

        return Split(self.sources, self.valid, self.data, apart=self.apart, beside=self.beside)


class TokensStep(Reads):
    """A tokens folder."""

    kind: ClassVar[str] = "tokens"
    version: ClassVar[int] = 4
    tokenizer: Step  # a folder that holds the tokenizer
    template: Step | None = None  # a folder whose chat template renders conversations instead of the tokenizer's

    def encoder(self) -> Encoder:
        """The encoder from documents to ids."""
        from btx.data.packed import Encoder, load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer.folder)
        if self.template:
            tokenizer.chat_template = load_tokenizer(self.template.folder).chat_template
        return Encoder(tokenizer, self.data.loss_mask, date=self.data.date)

    def check(self, asked: int) -> None:
        """Read all documents once; RecipeError, with counts, if one is bad or they are too few.

        While the tokenizer does not exist yet, bytes are counted, an upper bound of the tokens.
        """
        from btx.data.packed import survey, train_tokens

        if self.done:
            tokens, counts = train_tokens(self.folder), ""
        else:
            split = self.split()
            encoder = self.encoder() if self.tokenizer.folder.is_dir() else None
            tokens = survey(split, encoder, enough=asked + 1, label=self.label)
            counts = f" ({split.summary(len(self.sources), len(self.valid))})"
            if split.counts.documents and not split.test and (self.data.holdout or self.valid):
                raise RecipeError(
                    f"{self.label}: there is no document to hold out{counts}. Name `valid` files that have some."
                )
        if not tokens:
            raise RecipeError(f"{self.label}: too little data, there is no document to train on{counts}. Give it more.")
        if tokens <= asked:
            raise RecipeError(
                f"{self.label}: too little data, {tokens} tokens to train on{counts}, where one sequence for each "
                f"training takes {asked + 1}. Give it more, or a shorter sequence_length."
            )

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Tokenise all documents."""
        from btx.data.packed import write_tokens

        split, encoder = self.split(), self.encoder()
        facts = write_tokens(out, split, settings=self.data, encoder=encoder)
        for warning in (*self.notes, *split.warnings, *encoder.warnings):
            emit(Warned(self.label, warning))
        for number, what in (
            (facts["left_out"], "documents are held out, here or for another domain, and not trained on"),
            (facts["read"]["bad"], f"bad lines skipped, first {facts['read']['first_bad']}"),
        ):
            if number:
                emit(Warned(self.label, f"{number} {what}"))
        return facts
