"""Reads a Hugging Face folder in blocks of bounded size, and refuses what is unsafe.

Nothing found in a checkpoint is ever run or followed: no pickle, no remote code, no path that leaves the folder. Files
are read, never memory-mapped: mapped pages count as memory of the process, which must stay bounded for any model.
`btx.checkpoints.writer` writes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from btx.checkpoints.carried import carried
from btx.checkpoints.names import EMBEDDING, HEAD, of_language_model
from btx.checkpoints.validate import BUFFERS, DTYPES, Entry, read_config, read_entries
from btx.errors import ArtifactError
from btx.graph.artifact import file_digest, fingerprint

TIED = ("jetmoe",)  # model types whose head is tied unless their config says otherwise
BLOCK = 2**20  # elements per block: 2 or 4 MB, which stay in a CPU cache from reading to writing
LARGEST_READ = 2**30  # bytes; the system returns less than 2 GiB at once


class Tensors:
    """The tensors in a folder's files, by name, read whole or block by block."""

    def __init__(self, folder: Path, entries: dict[str, Entry]) -> None:
        self.folder, self.entries = folder, entries
        self._open: dict[str, int] = {}

    def flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor in row-major order: a new tensor (stop - start,) in its stored dtype."""
        entry = self.entries[name]
        found = torch.empty(stop - start, dtype=DTYPES[entry.dtype])
        if stop > start:
            self._fill(entry, found.view(torch.uint8).numpy().data, entry.offset + start * found.itemsize)
        return found

    def _fill(self, entry: Entry, buffer: memoryview, offset: int) -> None:
        path = self.folder / entry.file
        try:
            if entry.file not in self._open:
                handle = os.open(path, os.O_RDONLY)
                if self._open.setdefault(entry.file, handle) != handle:  # another thread was faster
                    os.close(handle)
            done = 0
            while done < len(buffer):
                part = buffer[done : done + LARGEST_READ]
                count = os.preadv(self._open[entry.file], [part], offset + done)
                if not count:
                    raise OSError("it ends too early")
                done += count
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error}). Fetch it again.") from error

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, in its stored dtype, on the CPU."""
        entry = self.entries[name]
        return self.flat(name, 0, entry.count).view(entry.shape)

    def blocks(
        self, name: str, start: int = 0, stop: int | None = None, *, size: int = BLOCK
    ) -> Iterator[torch.Tensor]:
        """Elements [start, stop) of a tensor, or all of them, as flat blocks of at most `size` elements, in order."""
        end = self.entries[name].count if stop is None else stop
        for at in range(start, end, size):
            yield self.flat(name, at, min(at + size, end))

    def close(self) -> None:
        """Close the open files."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


class Checkpoint(Tensors):
    """A validated Hugging Face folder: its config and its tensors.

    A tied head and embedding are one tensor, under the embedding's name, whichever of the two is stored. ArtifactError
    when both are stored and differ: transformers would then leave them untied, against the config.
    """

    head: Entry | None = None  # the stored head of a tied model, if it has one

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        found = read_entries(folder)
        named = of_language_model(found, self.config["model_type"])
        entries = {name: found[stored] for name, stored in named.items() if not BUFFERS.search(name)}
        if self.config.get("tie_word_embeddings", self.config["model_type"] in TIED) and HEAD in entries:
            self.head = entries.pop(HEAD)
            entries = {**entries, EMBEDDING: entries.get(EMBEDDING, self.head)}
            require_tied(folder, self.head, entries[EMBEDDING])
        super().__init__(folder, dict(sorted(entries.items(), key=lambda item: (item[1].file, item[1].offset))))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that holds the most bytes of the weights."""
        sizes: dict[str, int] = {}
        for entry in self.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size
        return DTYPES[max(sorted(sizes), key=lambda d: sizes[d])]

    def digest(self, file_digest: Callable[[Path], str] = file_digest) -> str:
        """SHA-256 over everything that defines the model: config, tokenizer files and weights."""
        names = {e.file for e in self.entries.values()} | {"config.json"} | ({self.head.file} if self.head else set())
        names |= {*carried(self.folder)}
        return fingerprint([[n, file_digest(self.folder / n)] for n in sorted(names)])


def require_tied(folder: Path, head: Entry, embedding: Entry) -> None:
    """ArtifactError unless two tensors that a config ties have the same values."""
    stored = Tensors(folder, {HEAD: head, EMBEDDING: embedding})
    same = head.shape == embedding.shape and all(
        torch.equal(a.double(), b.double()) or torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # the same NaN too
        for a, b in zip(stored.blocks(HEAD), stored.blocks(EMBEDDING), strict=True)
    )
    stored.close()
    if not same:
        raise ArtifactError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings: true), but {HEAD} is stored "
            f"beside {EMBEDDING} with other values. Set tie_word_embeddings: false in config.json if the stored head "
            f"is the one that was trained, or remove {HEAD} from the weights if it is not."
        )


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Checkpoint]:
    """A checkpoint whose files are closed at the end."""
    checkpoint = Checkpoint(folder)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on one thread: on blocks this small, synchronising threads costs more than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation files byte for byte, since converters of other tools look at them."""
    for name in carried(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


_EXPONENT = {  # dtype: the integer type of its width, and its exponent bits, all of which NaN and infinity have set
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
}


def count_non_finite(tensor: torch.Tensor) -> int:
    """Number of NaN or infinite elements, from their bits: ten times as fast as arithmetic on bfloat16."""
    integer, exponent = _EXPONENT[tensor.dtype]
    bits = tensor.contiguous().view(-1).view(torch.uint8).numpy().view(integer)
    magnitude = bits & integer(2 ** (8 * bits.itemsize - 1) - 1)
    if not len(bits) or magnitude.max() < exponent:
        return 0
    return int((magnitude >= exponent).sum())


def require_finite(checkpoint: Checkpoint, who: str) -> None:
    """Read every tensor once; ArtifactError naming the first one that holds a NaN or an infinity."""
    for name in checkpoint.entries:
        bad = sum(map(count_non_finite, checkpoint.blocks(name)))
        if bad:
            raise ArtifactError(
                f"{who} ({checkpoint.folder}): {name} holds {bad} NaN or infinite values. "
                "Use an earlier checkpoint of that model."
            )
