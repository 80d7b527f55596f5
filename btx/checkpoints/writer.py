"""Writes a checkpoint's weights shard by shard, in blocks of bounded size, hashed and checked on the way.

The headers are fixed before the first tensor is made, so the bytes depend on the rows alone. Threads hash, write and
flush while the caller makes the next block. With a `Resume`, a shard that an earlier attempt finished is reused.
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
QUEUED = 12  # blocks queued for hashing and writing: with 4, one side waited for the other half of the time
FLUSHED = 2**28  # bytes between two flushes to disk
Meter = Callable[[Path, int, int], None]  # takes the current file, and the bytes of tensors done and in all


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written, and how to make it: pieces of any shape that follow each other in row-major order."""

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
    """Where finished shards are kept until all are done, and the inputs they must have been made from to be reused."""

    folder: Path
    made_from: str


def whole(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> TensorSpec:
    """The row of a tensor in memory, on any device; it is cast and moved to the CPU when it is written."""
    return TensorSpec(name, dtype, tuple(tensor.shape), lambda: [tensor.to("cpu", dtype)])


def copies(source: Checkpoint) -> list[TensorSpec]:
    """A row for every tensor of a checkpoint, unchanged."""
    return [
        TensorSpec(name, DTYPES[entry.dtype], entry.shape, partial(source.blocks, name))
        for name, entry in source.entries.items()
    ]


def write_weights(
    out: Path, rows: list[TensorSpec], *, shard_bytes: int | None = None, resume: Resume | None = None,
    progress: Meter | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write rows into safetensors shards in `out`; returns each file's SHA-256. A single shard is `model.safetensors`.

    `progress` is called after every block. ArtifactError names a tensor that holds a NaN or an infinity; no shard with
    one is ever finished.
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
    """Write the index, which maps tensors to shards, if there are several shards."""
    if len(shards) > 1:
        weight_map = {row.name: file for file, some in shards.items() for row in some}
        total = sum(row.nbytes for some in shards.values() for row in some)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shards_of(rows: list[TensorSpec], limit: int) -> dict[str, list[TensorSpec]]:
    """Rows by file name, in order; a file has at most `limit` bytes, or a single larger tensor."""
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
    """Reuse a shard of an earlier attempt, or write it and keep it for a later one; linked into `out`."""
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
    """The SHA-256 of an intact shard that was finished from the same inputs; None for any other."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(record.read_text(encoding="utf-8"))
        if said["about"] == about and file_digest(done) == said["sha256"]:
            return str(said["sha256"])
    return None


def header_of(rows: list[TensorSpec]) -> bytes:
    """The safetensors header of a file, padded to 8 bytes, with its length before it."""
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
    """Write one file and flush it to disk; returns its SHA-256."""
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
            if done - flushed > FLUSHED:  # so that the disk works while the rest is made, not only at the end
                flushing.put(data[:0])
                flushed = done
            count(done)
    sync(path)
    return digest.hexdigest()


def _blocks(rows: list[TensorSpec]) -> Iterator[tuple[memoryview, int]]:
    """The bytes of all rows, block by block, each with the running total."""
    done = 0
    for row in rows:
        for data in _checked(row):
            done += len(data)
            yield data, done


def _checked(row: TensorSpec) -> Iterator[memoryview]:
    """A row's pieces as bytes; ArtifactError for a NaN or an infinity, AssertionError for another size than planned."""
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
    """Overwrite tensors of a folder in place, cast to its dtypes; returns the changed files.

    Names and shapes must be the folder's own.
    """
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
    """A thread that consumes blocks in order, up to `QUEUED` behind the producer."""

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
        """Queue a block; raises the error of an earlier one."""
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
