"""The measurement of one model by one probe.

Reports are composed of these, so a further model or probe is measured alone, and a further report measures nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from btx.errors import DivergedError, RecipeError
from btx.events import Emit, Note
from btx.graph.artifact import fingerprint, is_published, read_manifest, write_json
from btx.graph.step import Step
from btx.recipe.settings import MeasureSettings, RoutingRule
from btx.steps.model import ModelStep
from btx.steps.tokens import TokensStep

if TYPE_CHECKING:
    import torch

    from btx.data.packed import Tokens
    from btx.probes.contract import Document, Found

NUMBERS, ROWS, TABLES = "numbers.json", "rows.parquet", "tables.json"
MISSING = "not available"  # in the place of numbers, with the reason


class Measure(Step):
    """A report folder: numbers.json by domain, rows.parquet with a row per item, and tables.json if there are any."""

    kind: ClassVar[str] = "measure"
    version: ClassVar[int] = 3
    model: ModelStep
    reference: ModelStep | None = None  # the seed, for a probe that compares with it
    probe: str
    probe_version: int
    options: dict[str, Any] = Field(default_factory=dict)  # the probe's own settings
    tokens: dict[str, TokensStep]  # by domain, in the seed's tokenizer: which documents are scored
    own: dict[str, TokensStep] = Field(default_factory=dict)  # the same documents in the model's own tokenizer, if any
    length: int
    settings: MeasureSettings
    rule: RoutingRule | None = None  # of a Mixture of Experts
    optional: bool = False  # whether a domain without documents is left out, not refused

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Measure and write, or copy an earlier measurement of the same bytes."""
        about = fingerprint([
            [self.probe, self.probe_version, json.dumps(self.options)], self.model.digest,  # whose order may count
            self.reference.digest if self.reference else None,
            {name: step.digest for name, step in (self.own or self.tokens).items()},
            {name: step.digest for name, step in self.tokens.items()}, self.length, self.settings.identity(),
            self.rule.identity() if self.rule else None,
        ])  # fmt: skip
        if twin := twin_of(self, about):
            emit(Note(self.label, f"same model as in {read_manifest(twin)['step']}: its result is copied"))
            for file in (NUMBERS, ROWS, TABLES):
                if (twin / file).is_file():
                    shutil.copyfile(twin / file, out / file)
            return {"measured": about}
        from btx.probes.contract import Found
        from btx.probes.registry import ALWAYS

        documents = self.documents()
        emit(Note(self.label, f"measures {sum(map(len, documents.values()))} documents"))
        found = self._measure(documents)
        if bad := not_finite(found.numbers) or not_finite(found.tables):
            if self.probe == ALWAYS:
                raise DivergedError(
                    f"{self.label}: the model's {bad} is not a finite number, so a training before it diverged. Lower "
                    "its learning rate."
                )
            found = Found({}, found.rows, missing=f"{bad} is not a finite number")
        write_json(out / NUMBERS, {MISSING: found.missing} if found.missing else found.numbers)
        write_rows(out / ROWS, found.rows)
        if found.tables:
            write_json(out / TABLES, found.tables)
        return {"measured": about}

    def read(self) -> Found:
        """The published result."""
        from btx.probes.contract import Found

        numbers, tables = (
            json.loads((self.folder / file).read_text(encoding="utf-8")) if (self.folder / file).is_file() else {}
            for file in (NUMBERS, TABLES)
        )
        missing = numbers.pop(MISSING, "")
        return Found(numbers, self.rows(), tables, missing)

    def rows(self) -> list[dict[str, Any]]:
        """The published rows, one per item."""
        return read_rows(self.folder)

    def documents(self) -> dict[str, list[Document]]:
        """The held-out documents to score, by domain: ids and bytes of each; RecipeError for a domain without any."""
        from btx.data.packed import Tokens

        found = {name: Tokens(step.folder).valid(self.settings.tokens, self.settings.split)
                 for name, step in self.tokens.items()}  # fmt: skip
        for domain, rows in found.items():
            if not rows and not self.optional:
                raise RecipeError(
                    f"domain {domain} has no held-out document to evaluate on ({self.settings.split}). Name `valid:` "
                    "files with several documents, or give it more data."
                )
        found = {name: rows for name, rows in found.items() if rows}
        own = {name: Tokens(step.folder) for name, step in self.own.items()}
        return {name: self._same(own[name], rows, name) if name in own else rows for name, rows in found.items()}

    def _same(self, tokens: Tokens, documents: list[Any], domain: str) -> list[Any]:
        """The same documents in another tokenizer; RecipeError if their byte sizes differ."""
        found = tokens.valid_documents(len(documents), self.settings.split)
        if [size for _, size in found] != [size for _, size in documents]:
            raise RecipeError(
                f"domain {domain}: a held-out document is a single token in the tokenizer of {self.name} or of the "
                "seed, so it cannot be scored in both. Remove one-word documents."
            )
        return found

    def _measure(self, documents: dict[str, list[Document]]) -> Found:
        """Open the model and run the probe; states the reason if the model cannot be measured."""
        from btx.data.encoder import load_tokenizer
        from btx.probes.contract import Data, Found
        from btx.probes.registry import probes

        probe = probes()[self.probe]
        if self.reference and self.own:
            return Found({}, missing="its tokenizer differs from the seed's")
        with ExitStack() as stack:
            dtype = self._dtype()
            model = stack.enter_context(self.model.open(where=self.where, dtype=dtype, rule=self.rule))
            if lacking := sorted(probe.needs - model.capabilities):
                return Found({}, missing=f"the model gives no {', no '.join(lacking)}")
            seed = stack.enter_context(self.reference.open(where=self.where, dtype=dtype)) if self.reference else None
            tokenizer = partial(load_tokenizer, self.model.folder)
            data = Data(documents, self.length, self.settings.batch_tokens, tokenizer)
            return probe.measure(model, seed, data, probe.settings.model_validate(self.options))

    def _dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32


def not_finite(value: Any, where: str = "") -> str:
    """Where the first NaN or infinity is in nested numbers, such as `math: bits_per_byte`; empty if there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next((bad for key, one in items if (bad := not_finite(one, f"{where}: {key}" if where else str(key)))), "")


def twin_of(step: Step, about: str) -> Path | None:
    """A published measurement of the same kind with the same `measured`, of the same model bytes and data, if any."""
    for folder in sorted((step.root / "steps").glob(f"{step.kind}-*")):
        if is_published(folder) and read_manifest(folder)["facts"].get("measured") == about:
            return folder
    return None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a measurement's folder, one per item."""
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(folder / ROWS).to_pylist()
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as Parquet, which every dataframe reads; a table without columns where there are none."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="zstd")


def experts_of(folder: Path) -> list[str]:
    """The names of the experts of a merged or finetuned model."""
    names: list[str] = json.loads((folder / "experts.json").read_text(encoding="utf-8"))["experts"]
    return names
