"""Writes a checkpoint's weights shard by shard, in blocks of bounded size, hashed and checked on the way.

The headers are fixed before the first tensor is made, so the bytes depend on nothing but the rows. Two threads hash and
write what the caller makes meanwhile. With a `Resume`, a shard that an earlier attempt finished is taken as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import queue
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from btx.checkpoints.layouts import INDEX, SINGLE
from btx.checkpoints.reader import Checkpoint, count_non_finite, opened
from btx.checkpoints.validate import DTYPES, NAMES
from btx.errors import ArtifactError
from btx.graph.artifact import canonical, file_digest, fingerprint, sync

SHARD_BYTES = 5 * 10**9
QUEUED = 12  # blocks that may wait to be hashed and written: with 4, one side waited for the other half of the time
FLUSHED = 2**28  # bytes after which they are brought to the disk
Meter = Callable[[Path, int, int], None]  # takes the file at work, bytes of tensors done and in all


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written, and how to make it: flat or shaped pieces that follow each other in row-major order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Resume:
    """Where finished shards wait until all are there, and what they must have been made from to be taken again."""

    folder: Path
    made_from: str


def whole(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> TensorSpec:
    """A row that is one tensor, at hand on whatever device, cast and brought over when its turn comes."""
    return TensorSpec(name, dtype, tuple(tensor.shape), lambda: [tensor.to("cpu", dtype)])


def copies(source: Checkpoint) -> list[TensorSpec]:
    """A row for every tensor of a checkpoint, as it is."""
    return [
        TensorSpec(name, DTYPES[entry.dtype], entry.shape, partial(source.blocks, name))
        for name, entry in source.entries.items()
    ]


def write_weights(
    out: Path, rows: list[TensorSpec], *, shard_bytes: int | None = None, resume: Resume | None = None,
    progress: Meter | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write rows into safetensors shards in `out`; returns the SHA-256 of each. One shard is `model.safetensors`.

    `progress` is told of every block. ArtifactError names a tensor that holds a NaN or an infinity; nothing with one is
    ever finished.
    """
    shards = shards_of(rows, shard_bytes or SHARD_BYTES)
    total = sum(row.nbytes for row in rows)
    done, digests = 0, {}
    for file, some in shards.items():

        def count(written: int, file: str = file, before: int = done) -> None:
            if progress:
                progress(out / file, before + written, total)

        digests[file] = _kept(out, file, some, resume, count) if resume else _write_shard(out / file, some, count)
        done += sum(row.nbytes for row in some)
        count(0, before=done)
    write_index(out, shards)
    return digests


def write_index(out: Path, shards: dict[str, list[TensorSpec]]) -> None:
    """Say which tensor lies in which file, where there are several."""
    if len(shards) > 1:
        weight_map = {row.name: file for file, some in shards.items() for row in some}
        total = sum(row.nbytes for some in shards.values() for row in some)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shards_of(rows: list[TensorSpec], limit: int) -> dict[str, list[TensorSpec]]:
    """Rows by file name, in order; a file has `limit` bytes at most, or one tensor that is larger."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for row in rows:
        if shards[-1] and filled + row.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += row.nbytes
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names, shards, strict=True))


def _kept(out: Path, file: str, rows: list[TensorSpec], resume: Resume, count: Callable[[int], None]) -> str:
    """A shard as an earlier attempt left it, or written anew and left for a later one; linked into `out`."""
    resume.folder.mkdir(parents=True, exist_ok=True)
    done, record = resume.folder / file, resume.folder / f"{file}.json"
    about = fingerprint([resume.made_from, file, [[r.name, str(r.dtype), list(r.shape)] for r in rows]])
    digest = _finished(done, record, about)
    if digest is None:
        part = resume.folder / f"{file}.part"
        record.unlink(missing_ok=True)
        digest = _write_shard(part, rows, count)
        part.replace(done)
        part.write_text(json.dumps({"about": about, "sha256": digest}), encoding="utf-8")
        sync(part)
        part.replace(record)
        sync(resume.folder)
    try:
        os.link(done, out / file)
    except OSError:  # a file system without hard links
        shutil.copyfile(done, out / file)
    return digest


def _finished(done: Path, record: Path, about: str) -> str | None:
    """The SHA-256 of a shard that was finished from the same things and is whole; None for any other."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(record.read_text(encoding="utf-8"))
        if said["about"] == about and file_digest(done) == said["sha256"]:
            return str(said["sha256"])
    return None


def header_of(rows: list[TensorSpec]) -> bytes:
    """The first bytes of a file, which say where each tensor lies."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for row in rows:
        end = position + row.nbytes
        header[row.name] = {"dtype": NAMES[row.dtype], "shape": list(row.shape), "data_offsets": [position, end]}
        position = end
    text = canonical(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(path: Path, rows: list[TensorSpec], count: Callable[[int], None]) -> str:
    """Write one file and bring it to the disk; returns its SHA-256."""
    digest = hashlib.sha256()
    with (
        path.open("wb", buffering=0) as out,
        _Behind(digest.update) as hashing,
        _Behind(partial(_write_all, out.fileno())) as writing,
        _Behind(lambda _block: os.fdatasync(out.fileno())) as flushing,
    ):
        flushed, header = 0, memoryview(header_of(rows))
        for data, done in chain([(header, 0)], _blocks(rows)):
            hashing.put(data)
            writing.put(data)
            if done - flushed > FLUSHED:  # the disk is at work while the rest is made, not only at the end
                flushing.put(data[:0])
                flushed = done
            count(done)
    sync(path)
    return digest.hexdigest()


def _blocks(rows: list[TensorSpec]) -> Iterator[tuple[memoryview, int]]:
    """All rows' bytes, with how many they are up to there."""
    done = 0
    for row in rows:
        for data in _checked(row):
            done += len(data)
            yield data, done


def _checked(row: TensorSpec) -> Iterator[memoryview]:
    """A row's pieces as bytes: none with a NaN or an infinity, and as many as were planned."""
    seen = 0
    for piece in row.pieces():
        if piece.dtype != row.dtype:
            raise AssertionError(f"{row.name} is {piece.dtype}, planned {row.dtype}")
        if count_non_finite(piece):
            raise ArtifactError(f"{row.name} would hold NaN or infinite values; nothing was published.")
        seen += piece.numel()
        if piece.numel():
            yield piece.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    if seen != math.prod(row.shape):
        raise AssertionError(f"{row.name} has {seen} elements, planned {row.shape}")


def overwrite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Write tensors over a folder's of the same names and shapes, cast to its dtypes; returns the files changed."""
    with opened(folder) as found:
        entries = {name: found.entries[name] for name in tensors}
    for name, tensor in tensors.items():
        entry = entries[name]
        row = whole(name, tensor, DTYPES[entry.dtype])
        if row.shape != entry.shape:
            raise AssertionError(f"{name} is {row.shape}, the file holds {entry.shape}")
        with (folder / entry.file).open("r+b", buffering=0) as stream:
            stream.seek(entry.offset)
            for data in _checked(row):
                _write_all(stream.fileno(), data)
    return {entry.file for entry in entries.values()}


class _Behind:
    """A thread that takes blocks in order, a few behind whoever makes them."""

    def __init__(self, take: Callable[[memoryview], None]) -> None:
        self._take = take
        self._queue: queue.Queue[memoryview | None] = queue.Queue(QUEUED)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Behind:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error and kind is None:
            raise self._error

    def put(self, block: memoryview) -> None:
        """Hand over a block; an error of an earlier one is raised here."""
        if self._error:
            raise self._error
        self._queue.put(block)

    def _work(self) -> None:
        while (block := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._take(block)
                except OSError as error:
                    self._error = error


def _write_all(handle: int, block: memoryview) -> None:
    while block:
        block = block[os.write(handle, block) :]
