"""Documents to packed tokens: writes and reads a tokens folder.

`train.bin` is one flat run of token ids (little-endian, `dtype` as `tokens.json` says), documents one after
another, each with the seed's start token where its tokenizer adds one, and its end-of-text token. `train.mask`
stands beside it when only answers are learned: one byte a token, 1 where it is to be predicted. `valid.bin` holds
the held-out documents, each led by one token of context; `tokens.json` says under `valid` (those to report on) and
`select` (those to choose settings on) where each lies, how many bytes of text it has, and the number of its source.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from btx.artifact import write_json
from btx.corpus import Document, cut
from btx.errors import ArtifactError, RecipeError
from btx.heldout import Side
from btx.settings import DataSettings
from btx.split import Held, Split

ROWS: dict[Side, str] = {"test": "valid", "select": "select"}  # where tokens.json has the documents of each side
BATCH = 512  # documents tokenised at once
Ids = list[int]


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, from local files only and without remote code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files end in any of a dozen kinds, bare Exception of Rust among them
        why = (str(error).splitlines() or [repr(error)])[0]
        raise ArtifactError(
            f"the tokenizer in {folder} cannot be loaded ({why}). Copy the tokenizer files of its base model into it."
        ) from error


class Encoder:
    """Turns documents into token ids, with the marks that the seed's tokenizer puts around a text."""

    def __init__(self, tokenizer: Any, loss_on: str) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.ids = 1 + max(tokenizer.get_vocab().values())  # ids stay below; len(tokenizer) misses gaps
        self.end: int | None = tokenizer.eos_token_id
        led = self._ids(["a"], special=True)[0][:1]
        self.start: int | None = led[0] if led and led[0] == tokenizer.bos_token_id else None

    def _ids(self, texts: list[str], *, special: bool = False) -> list[Ids]:
        done = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return done["input_ids"]  # type: ignore[no-any-return]

    def pieces(self, document: Document) -> list[tuple[str, bool]]:
        """A document's pieces, a conversation by the tokenizer's own chat template where it has one."""
        if not document.messages or not self.tokenizer.chat_template:
            return list(document.pieces)
        messages = list(document.messages)
        if self.loss_on == "all":
            return [(self._chat(messages), True)]
        texts = ["", *(self._chat(messages[:n]) for n in range(1, len(messages) + 1))]
        if not all(b.startswith(a) for a, b in itertools.pairwise(texts)):
            raise RecipeError(
                "the tokenizer's chat template rewrites earlier messages, so answers cannot be "
                "told from the rest. Set data.loss_on: all."
            )
        return [
            (b.removeprefix(a), m["role"] == "assistant")
            for (a, b), m in zip(itertools.pairwise(texts), messages, strict=True)
        ]

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(str(m["role"]) for m in messages[:6])
            said = f"the tokenizer's chat template refuses a conversation ({roles}, ...): {error}."
            raise RecipeError(
                f"{said} Leave such conversations out, or use a seed whose template takes them."
            ) from error

    def text(self, document: Document) -> str:
        """A document as it is trained on."""
        return "".join(text for text, _ in self.pieces(document))

    def encode(self, documents: list[Document]) -> Iterator[tuple[Ids, list[int]]]:
        """Token ids of each document and, for each id, whether it is to be predicted."""
        if self.loss_on == "all":
            for ids in self._ids([self.text(d) for d in documents]):
                yield self._marked(ids, [1] * len(ids))
            return
        for document in documents:
            pieces = self.pieces(document)
            encoded = self._ids([text for text, _ in pieces])
            yield self._marked(
                [i for ids in encoded for i in ids],
                [int(p[1]) for p, ids in zip(pieces, encoded, strict=True) for _ in ids],
            )

    def _marked(self, ids: Ids, learn: list[int]) -> tuple[Ids, list[int]]:
        start = [] if self.start is None or ids[:1] == [self.start] else [self.start]  # a template may bring it
        end = [] if self.end is None else [self.end]
        return [*start, *ids, *end], [*(1 for _ in start), *learn, *(1 for _ in end)]

    def scored(self, texts: list[str]) -> list[Ids]:
        """Token ids of held-out texts, led by one of context (start, else end of text) that is not scored."""
        lead = self.start if self.start is not None else self.end
        return [ids if lead is None or ids[:1] == [lead] else [lead, *ids] for ids in self._ids(texts)]


def write_tokens(out: Path, split: Split, *, settings: DataSettings, encoder: Encoder) -> dict[str, Any]:
    """Fill `out` with the tokens of a domain."""
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
    write_json(out / "tokens.json", {"dtype": dtype.str, "masked": settings.loss_on == "completion", **rows, **facts})
    return facts


def survey(split: Split, encoder: Encoder | None, *, enough: int) -> int:
    """Read a whole domain, and count the tokens to train on up to `enough`; without an encoder, bytes instead."""
    return split.survey(lambda document: _size(document, encoder), enough=enough)


def _size(document: Document, encoder: Encoder | None) -> int:
    if encoder is None:
        return len(document.text.encode()) + 1
    return sum(len(ids) for ids, _ in encoder.encode([document]))


def train_tokens(folder: Path) -> int:
    """How many tokens of a tokens folder are trained on."""
    return int(json.loads((folder / "tokens.json").read_text(encoding="utf-8"))["train_tokens"])


def _write_train(
    out: Path, documents: Iterable[Document], encoder: Encoder, settings: DataSettings, dtype: np.dtype[Any]
) -> int:
    written = 0
    masked = settings.loss_on == "completion"
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
    """Rows [first id, number of ids, bytes of text, number of the source document], one a document."""
    rows: list[list[int]] = []
    numbers: dict[int, int] = {}
    for batch in (held[start : start + BATCH] for start in range(0, len(held), BATCH)):
        texts = [cut(encoder.text(one.document), settings.valid_bytes) for one in batch]
        for one, text, ids in zip(batch, texts, encoder.scored(texts), strict=True):
            if len(ids) < 2:
                continue
            source = numbers.setdefault(one.source, len(numbers))
            rows.append([file.tell() // dtype.itemsize, len(ids), len(text.encode()), source])
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
        """Held-out documents of a side as (ids, bytes of text), in the order of hashes, until `limit` tokens."""
        count = 0
        for _, length, *_ in self._rows[side]:
            count += 1
            limit -= length - 1
            if limit <= 0:
                break
        return self.valid_documents(count, side)

    def valid_documents(self, count: int, side: Side = "test") -> list[tuple[NDArray[np.int64], int]]:
        """The first held-out documents as (ids, bytes of text), in order."""
        rows = self._rows[side][:count]
        return [(self._valid[at : at + length].astype(np.int64), size) for at, length, size, *_ in rows]

    def sources(self, count: int, side: Side = "test") -> list[int]:
        """For each of the first held-out documents, the number of the source document that it is a piece of."""
        return [row[3] for row in self._rows[side][:count]]
