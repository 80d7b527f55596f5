"""`btx moe`: adds experts to an exported mixture, removes, replaces or masks them, or extracts them as dense models.

Each command writes a new folder that loads like the export it comes from, with digests and golden logits of its own,
and prints its effect on every domain that `--data NAME=PATH` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btx.checkpoints.layouts import SINGLE
from btx.checkpoints.reader import Checkpoint, carry_files, one_thread, opened, require_finite
from btx.checkpoints.token_map import carry_tokenizer, tokenizer_digest
from btx.checkpoints.validate import read_config, sees_images
from btx.checkpoints.writer import overwrite
from btx.data.corpus import resolve
from btx.data.packed import Encoder, load_tokenizer
from btx.data.split import Split
from btx.errors import ArtifactError, RecipeError
from btx.export import lifecycle
from btx.export.card import changed_card, table
from btx.export.extract import extract as extracted
from btx.export.masked import Masked
from btx.export.portable import notes, portable_config
from btx.export.proof import PROOF, SUMS, check_sums, make_proof, write_sums
from btx.graph.artifact import publish, unwritable, write_json
from btx.graph.step import versions
from btx.merge.canonical import opened_canonical
from btx.merge.lineage import LEAST_COSINE, distance
from btx.merge.router_fit import fit_rows
from btx.models import model
from btx.models.families import mixture_family
from btx.models.mixture import Moe
from btx.models.opened import opened_checkpoint
from btx.models.target import warnings_of
from btx.probes.bits_per_byte import bits_per_byte, nats
from btx.probes.contract import Document
from btx.recipe.settings import DataSettings, RunSettings

Say = Callable[[str], None]
MASKED = "masked"  # folder inside a mixture's that holds its masked experts
WHERE = RunSettings()
LENGTH, ROWS, ROUNDS = 512, 8, 2  # tokens per sequence, sequences per batch, fits of a new row


@dataclass(frozen=True)
class Texts:
    """One domain: sequences to fit a router on (T, S), and held-out documents to measure by."""

    fit: torch.Tensor
    held_out: list[Document]

    def batches(self) -> Iterator[torch.Tensor]:
        """The sequences, some at a time."""
        yield from (self.fit[start : start + ROWS] for start in range(0, len(self.fit), ROWS))


def read_texts(sources: Mapping[str, str], folder: Path, *, tokens: int) -> dict[str, Texts]:
    """Domains by name from files, folders or globs, up to `tokens` tokens of each; RecipeError for too little text."""
    encoder = Encoder(load_tokenizer(folder), "all")
    found = {}
    for name, pattern in sources.items():
        split = Split(resolve([pattern], Path.cwd(), f"--data {name}"), [], DataSettings())
        ids: list[int] = []
        for document in split.train():
            if len(ids) < tokens:
                ids += next(iter(encoder.encode([document])))[0]
        count = min(len(ids), tokens)
        length = min(LENGTH, max(count // 4, 1))
        rows = torch.tensor(ids[: count // length * length]).view(-1, length)
        documents = [(np.array(i, np.int64), size) for i, size in _held_out(split, encoder, tokens)]
        if not len(rows) or not documents:
            raise RecipeError(f"--data {name}: {pattern} holds {split.counts.documents} documents, too little text.")
        found[name] = Texts(rows, documents)
    return found


def _held_out(split: Split, encoder: Encoder, tokens: int) -> Iterator[tuple[list[int], int]]:
    for held in split.test:
        ids, size = encoder.scored([held.document], DataSettings().valid_bytes)[0]
        if len(ids) > 1:
            yield ids, size
        tokens -= len(ids)
        if tokens <= 0:
            return


def measure(folder: Path, texts: Mapping[str, Texts]) -> dict[str, float]:
    """Bits per byte on each domain's held-out documents."""
    if not texts:
        return {}
    found = {}
    with opened_checkpoint(folder, where=WHERE) as opened_model:
        for name, one in texts.items():
            lost = nats(opened_model, one.held_out, length=LENGTH, batch_tokens=8192)
            found[name] = bits_per_byte(lost, np.array([size for _, size in one.held_out], dtype=float))
    return found


def check_out(out: Path, folder: Path) -> None:
    """RecipeError unless `out` is a new folder outside the mixture, which must stay unchanged."""
    try:
        if out.exists():
            raise RecipeError(f"--out: {out} already exists. Name a new folder, or remove it.")
        inside = out.resolve().is_relative_to(folder.resolve())
    except OSError as error:
        raise unwritable(out, error) from error
    if inside:
        raise RecipeError(f"--out: {out} lies inside {folder}, which must stay unchanged. Name a folder beside it.")


class Work:
    """One `btx moe` command: reads a folder, writes another, measures both."""

    def __init__(
        self, stack: ExitStack, folder: Path, out: Path, data: Mapping[str, str], tokens: int, say: Say
    ) -> None:
        folder, out = folder.absolute(), out.absolute()  # "." gets a name too
        check_out(out, folder)
        if (folder / SUMS).is_file():  # nothing is built on a folder that has changed
            check_sums(folder)
        stack.enter_context(one_thread())
        self.stack, self.folder, self.out, self.say = stack, folder, out, say
        self.moe = Moe(stack.enter_context(opened(folder)))
        self.texts = read_texts(data, folder, tokens=tokens)

    def require_unmasked(self) -> None:
        """RecipeError when experts are masked: the new folder would lack them, and their places would change."""
        if (self.folder / MASKED).exists():
            raise RecipeError(
                f"{self.folder} has experts switched off in {MASKED}/, which the new folder would not have. Use "
                "`btx moe unmask` first (and mask all of them at once), or give them up by removing that folder."
            )

    def dense(self, folder: Path, name: str) -> Checkpoint:
        """A dense model that is to become an expert; ArtifactError unless it descends from the mixture's seed."""
        dense = self.stack.enter_context(opened_canonical(folder))
        who = f"the expert {name} ({folder})"
        if different := lifecycle.config_of_pair(dense, self.moe, who):
            raise ArtifactError(f"{who} does not fit {self.folder}: config.json differs in {'; '.join(different)}.")
        for warning in warnings_of(dense.config, who, sees_images=sees_images(folder)):
            self.say(f"warning: {warning}")
        if tokenizer_digest(folder) != tokenizer_digest(self.folder):
            raise ArtifactError(f"{who} has another tokenizer than {self.folder}: the same ids mean other tokens.")
        for tensor in sorted(self.moe.checkpoint.entries.keys() & dense.entries.keys()):
            if self.moe.checkpoint.entries[tensor].shape != dense.entries[tensor].shape:
                raise ArtifactError(
                    f"{who} does not fit {self.folder}: the shape of {tensor} is {dense.entries[tensor].shape}, "
                    f"there it is {self.moe.checkpoint.entries[tensor].shape}. Use a model trained from the same seed."
                )
        far = distance(self.moe.checkpoint, dense, names=self.moe.checkpoint.entries.keys() & dense.entries.keys())
        if math.isnan(far["cosine"]):
            require_finite(dense, who)
        if not far["cosine"] >= LEAST_COSINE:
            raise ArtifactError(
                f"{who} does not descend from the seed of {self.folder}: the cosine between their shared weights is "
                f"{far['cosine']:.3f}, relatives have more than {LEAST_COSINE}. Train it from the same seed."
            )
        return dense

    def finish(self, did: str, write: Callable[[Path], None], parents: Mapping[str, Path]) -> None:
        """Publish what `write` puts into a folder, with golden logits, card and digests, and print the table."""
        before = measure(self.folder, self.texts)
        rows: dict[str, dict[str, float]] = {}

        def produce(out: Path) -> None:
            write(out)
            carry_tokenizer(self.folder, out, self.folder)
            config = portable_config(read_config(out))
            write_json(out / "config.json", config)
            self.say("computing golden logits and measuring")
            write_json(out / PROOF, make_proof(out))
            if before:
                after = measure(out, self.texts)
                rows.update(before=before, after=after, change={d: after[d] - before[d] for d in before})
            loads = notes(config, self.moe.layout if mixture_family(config) else "published", out)
            (out / "README.md").write_text(changed_card(did, self.folder.name, rows, loads), encoding="utf-8")
            write_sums(out)

        digests = {name: Checkpoint(path).digest() for name, path in parents.items()}
        publish(self.out, produce, {"step": did, "parents": digests, "versions": versions()})
        print(f"{did}: {self.out}")
        print(table(rows, "bits per byte") if rows else "No --data NAME=PATH was given, so nothing was measured.")


def remove(work: Work, names: list[str]) -> None:
    """Write the mixture without some experts."""
    work.require_unmasked()
    work.moe.numbers(names)
    work.finish(f"btx moe remove {' '.join(names)}", lambda out: lifecycle.remove(out, work.moe, names),
                {"mixture": work.folder})  # fmt: skip


def mask(work: Work, names: list[str]) -> None:
    """Write the mixture without some experts, which are kept whole in a folder of their own inside it."""
    work.require_unmasked()

    def write(out: Path) -> None:
        lifecycle.remove(out, work.moe, names)
        lifecycle.keep(out / MASKED, work.moe, names)

    work.finish(f"btx moe mask {' '.join(names)}", write, {"mixture": work.folder})


def unmask(work: Work) -> None:
    """Write the mixture with its masked experts back in their places."""
    kept = work.folder / MASKED
    if not (kept / SINGLE).is_file() and not list(kept.glob("*.safetensors")):
        raise ArtifactError(f"{work.folder} has no folder {MASKED}/: nothing is masked in it.")
    away = Masked(work.stack.enter_context(opened(kept)), work.moe)
    work.finish("btx moe unmask", lambda out: lifecycle.unmask(out, work.moe, away), {"mixture": work.folder})


def replace(work: Work, name: str, expert: Path) -> None:
    """Write the mixture with another model in place of an expert."""
    work.require_unmasked()
    work.moe.index(name)
    source = lifecycle.from_dense(work.dense(expert, name), work.moe, name)
    work.finish(f"btx moe replace {name}", lambda out: lifecycle.replace(out, work.moe, name, source),
                {"mixture": work.folder, name: expert})  # fmt: skip


def extract(work: Work, name: str) -> None:
    """Write an expert and the shared tensors as a dense model."""
    work.moe.index(name)
    work.finish(f"btx moe extract {name}", lambda out: extracted(out, work.moe, name), {"mixture": work.folder})


def add(work: Work, name: str, expert: Path) -> None:
    """Write the mixture with one more expert, its router rows fitted by ridge regression."""
    work.require_unmasked()
    lifecycle.require_new(work.moe, name)
    if name not in work.texts or len(work.texts) < 2:
        raise RecipeError(
            f"add needs text to fit the router's rows on: --data {name}=PATH of the new expert's own domain, and "
            "--data NAME=PATH of each old one."
        )
    source = lifecycle.from_dense(work.dense(expert, name), work.moe, name)

    def write(out: Path) -> None:
        work.say("fitting the router's rows")
        rows = _fit(work, work.folder, name)
        lifecycle.add(out, work.moe, name, source, rows.__getitem__)
        carry_files(work.folder, out)
        for _ in range(ROUNDS - 1):
            rows = _fit(work, out, name)
            routers = {layer: lifecycle.with_row(work.moe.router(layer), row) for layer, row in rows.items()}
            overwrite(out, {work.moe.family.router_name(layer): router for layer, router in routers.items()})

    work.finish(f"btx moe add {name}", write, {"mixture": work.folder, name: expert})


def _fit(work: Work, folder: Path, name: str) -> dict[int, torch.Tensor]:
    """The new expert's router row (D,) by layer, fitted on the router inputs of a folder's model."""
    net: Any = model.load(folder, where=WHERE).to(model.device_of(WHERE)).eval()
    old = (ids for domain, one in work.texts.items() if domain != name for ids in one.batches())
    rows = fit_rows(net, work.texts[name].batches(), old, experts=work.moe.count)
    return dict(zip(work.moe.layers, rows, strict=True))


def parse_data(given: tuple[str, ...]) -> dict[str, str]:
    """NAME=PATH pairs; RecipeError for anything else."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path or name in found:
            raise RecipeError(f"--data {text!r} is not of the form NAME=PATH, or its name appears twice.")
        found[name] = path
    return found
