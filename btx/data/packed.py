"""Packs documents into tokens: writes and reads a tokens folder.

`train.bin` is one flat run of token ids (little-endian, `dtype` as `tokens.json` says), documents one after
another, each with the seed's start token where its tokenizer adds one, and its end-of-text token. `train.mask`
is the loss mask beside it when only answers are learned: one byte per token, 1 where it has a loss. `valid.bin` holds
the held-out documents, each led by one token of context; `tokens.json` says under `valid` (those to report on) and
`select` (those to choose settings on) where each lies, how many bytes of text it has, and the number of its source.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from btx.data.documents import Document
from btx.data.encoder import Encoder as Encoder
from btx.data.encoder import load_tokenizer as load_tokenizer
from btx.data.heldout import Side
from btx.data.split import Held, Split
from btx.errors import RecipeError
from btx.graph.artifact import write_json
from btx.recipe.settings import DataSettings

ROWS: dict[Side, str] = {"test": "valid", "select": "select"}  # where tokens.json has the documents of each side
BATCH = 512  # documents tokenised at once


def write_tokens(out: Path, split: Split, *, settings: DataSettings, encoder: Encoder) -> dict[str, Any]:
    """Write a domain's tokens into `out`; returns the counts in tokens.json."""
    dtype = np.dtype("<u2" if encoder.ids <= 2**16 else "<u4")
    tokens = _write_train(out, split.train(), encoder, settings, dtype)
    with (out / "valid.bin").open("wb") as file:
        sides = [_write_valid(file, held, encoder, settings, dtype) for held in (split.test, split.select)]
    rows = dict(zip(ROWS.values(), sides, strict=True))
    facts = {
        "train_tokens": tokens,
        "valid_tokens": sum(length - 1 for _, length, *_ in rows["valid"]),
        "read": asdict(split.counts),
        "read_valid": asdict(split.valid_counts),
        "valid_documents": len(rows["valid"]),
        "select_documents": len(rows["select"]),
        "left_out": split.left_out,
    }
    write_json(out / "tokens.json", {"dtype": dtype.str, "masked": settings.loss_mask == "completion", **rows, **facts})
    return facts


def survey(split: Split, encoder: Encoder | None, *, enough: int, label: str) -> int:
    """Read a whole domain, and count the tokens to train on up to `enough`; without an encoder, bytes instead.

    RecipeError where only answers are to be learned and there is none: no token would have a loss.
    """
    learned = split.settings.loss_mask == "all"

    def size(document: Document) -> int:
        nonlocal learned
        found = list(encoder.encode([document])) if encoder else []
        learned = learned or any(any(learn) for _, learn in found) or (not encoder and _answers(document))
        return sum(len(ids) for ids, _ in found) if encoder else len(document.text.encode()) + 1

    def look(document: Document) -> None:
        nonlocal learned
        written = encoder.written(document) if encoder else None
        learned = learned or (bool(written.made.learned) if written else _answers(document))

    tokens = split.survey(size, enough=enough, look=look)
    if tokens and not learned:
        raise RecipeError(
            f"{label}: no document has an answer, so under data.loss_mask: completion nothing would be learned. Give "
            "answers the role assistant, or set data.loss_mask: all."
        )
    return tokens


def _answers(document: Document) -> bool:
    return any(learned for _, learned in document.pieces)


def train_tokens(folder: Path) -> int:
    """Number of training tokens in a tokens folder."""
    return int(json.loads((folder / "tokens.json").read_text(encoding="utf-8"))["train_tokens"])


def _write_train(
    out: Path, documents: Iterable[Document], encoder: Encoder, settings: DataSettings, dtype: np.dtype[Any]
) -> int:
    written = 0
    masked = settings.loss_mask == "completion"
    stream = iter(documents)
    with (out / "train.bin").open("wb") as ids_file, (out / "train.mask").open("wb") as mask_file:
        while batch := list(itertools.islice(stream, BATCH)):
            for ids, learn in encoder.encode(batch):
                ids_file.write(np.asarray(ids, dtype).tobytes())
                if masked:
                    mask_file.write(bytes(learn))
                written += len(ids)
    if not masked:
        (out / "train.mask").unlink()
    return written


def _write_valid(
    file: BinaryIO, held: list[Held], encoder: Encoder, settings: DataSettings, dtype: np.dtype[Any]
) -> list[list[int]]:
    """Rows [first id, number of ids, bytes of text, number of the source document], one per document."""
    rows: list[list[int]] = []
    numbers: dict[int, int] = {}
    for batch in (held[start : start + BATCH] for start in range(0, len(held), BATCH)):
        scored = encoder.scored([one.document for one in batch], settings.valid_bytes)
        for one, (ids, size) in zip(batch, scored, strict=True):
            if len(ids) < 2:
                continue
            source = numbers.setdefault(one.source, len(numbers))
            rows.append([file.tell() // dtype.itemsize, len(ids), size, source])
            file.write(np.asarray(ids, dtype).tobytes())
    return rows


class Tokens:
    """A tokens folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        self.dtype = np.dtype(about["dtype"])
        self.train = self._map(folder / "train.bin", self.dtype)
        self.mask = self._map(folder / "train.mask", np.dtype("u1")) if about["masked"] else None
        self._valid = self._map(folder / "valid.bin", self.dtype)
        self._rows: dict[str, list[list[int]]] = {side: about.get(key, []) for side, key in ROWS.items()}

    @staticmethod
    def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    def valid(self, limit: int, side: Side = "test") -> list[tuple[NDArray[np.int64], int]]:
        """Held-out documents of a side as (ids, bytes of text), in hash order, until `limit` tokens."""
        count = 0
        for _, length, *_ in self._rows[side]:
            count += 1
            limit -= length - 1
            if limit <= 0:
                break
        return self.valid_documents(count, side)

    def valid_documents(self, count: int, side: Side = "test") -> list[tuple[NDArray[np.int64], int]]:
        """The first `count` held-out documents as (ids, bytes of text), in order."""
        rows = self._rows[side][:count]
        return [(self._valid[at : at + length].astype(np.int64), size) for at, length, size, *_ in rows]

    def sources(self, count: int, side: Side = "test") -> list[int]:
        """The number of the source document of each of the first `count` held-out documents."""
        return [row[3] for row in self._rows[side][:count]]
