"""Reads a Hugging Face folder tensor by tensor, writes one shard by shard, and refuses what is unsafe.

Nothing found in a checkpoint is ever run: no pickle, no remote code, no path that leaves the folder. This is the
only file that opens `*.safetensors` for models.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from btx.artifact import canonical, file_digest, fingerprint
from btx.errors import ArtifactError
from btx.safety import BUFFERS, CARRIED, DTYPES, INDEX, NAMES, SINGLE, read_config, read_entries

SHARD_BYTES = 5 * 10**9


class Checkpoint:
    """A checked Hugging Face folder: its config, and its tensors by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.entries = {n: e for n, e in read_entries(folder).items() if not BUFFERS.search(n)}
        if self.config.get("tie_word_embeddings") and "model.embed_tokens.weight" in self.entries:
            self.entries.pop("lm_head.weight", None)
        self._open: dict[str, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype, on the CPU. The memory is the file's own pages: do not write to it."""
        file = self.entries[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.folder / file), framework="pt")
            return self._open[file].get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.folder / file} cannot be read ({error}). Fetch it again.") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have."""
        sizes: dict[str, int] = {}
        for entry in self.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size
        return DTYPES[max(sorted(sizes), key=lambda d: sizes[d])]

    def digest(self, file_digest: Callable[[Path], str] = file_digest) -> str:
        """SHA-256 over what decides the model: config, tokenizer files and weights."""
        names = {e.file for e in self.entries.values()} | {"config.json"}
        names |= {n for n in CARRIED if (self.folder / n).is_file()}
        return fingerprint([[n, file_digest(self.folder / n)] for n in sorted(names)])

    def close(self) -> None:
        """Let go of the open files."""
        self._open.clear()


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of what the tokenizer maps to what: vocabulary, merges and added tokens, not their formatting."""
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            model, added = data["model"], data.get("added_tokens", [])
            merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
            return fingerprint([model.get("vocab"), merges, [[t["id"], t["content"]] for t in added]])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{path} is damaged ({error!r}). Fetch the checkpoint again.") from error
    for name in ("tokenizer.model", "vocab.json"):
        if (folder / name).is_file():
            return file_digest(folder / name)
    raise ArtifactError(
        f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json). "
        "Copy the tokenizer files of its base model into it."
    )


def carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation files byte for byte, since converters of other tools look at them."""
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def count_non_finite(tensor: torch.Tensor) -> int:
    """How many entries are NaN or infinite. A sum settles the usual case in one pass."""
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def require_finite(checkpoint: Checkpoint, who: str) -> None:
    """Read every tensor once; ArtifactError naming the first one that holds a NaN or an infinity."""
    for name in checkpoint.entries:
        bad = count_non_finite(checkpoint.read(name))
        if bad:
            raise ArtifactError(
                f"{who} ({checkpoint.folder}): {name} holds {bad} NaN or infinite values. "
                "Use an earlier checkpoint of that model."
            )


Planned = tuple[str, torch.dtype, tuple[int, ...]]


def write_weights(
    folder: Path, plan: list[Planned], tensors: Iterable[torch.Tensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as they come into safetensors shards whose headers are fixed beforehand by `plan`.

    `tensors` yields one tensor per row of `plan`, in its order, dtype and shape; only one is held at a time. One
    shard is `model.safetensors`; more get the index. The bytes depend on nothing but the arguments.
    """
    shards = _split(plan, shard_bytes)
    stream = iter(tensors)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, rows in zip(names, shards, strict=True):
        with (folder / file).open("wb") as out:
            _write_shard(out, rows, stream)
    if next(stream, None) is not None:
        raise AssertionError("more tensors than planned")
    if len(shards) > 1:
        weight_map = {row[0]: file for file, rows in zip(names, shards, strict=True) for row in rows}
        index = {"metadata": {"total_size": sum(map(_nbytes, plan))}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _nbytes(row: Planned) -> int:
    return math.prod(row[2]) * torch.empty(0, dtype=row[1]).element_size()


def _split(plan: list[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for row in plan:
        if shards[-1] and filled + _nbytes(row) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(row)
        filled += _nbytes(row)
    return shards


def _write_shard(out: BinaryIO, rows: list[Planned], tensors: Iterator[torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for row in rows:
        end = position + _nbytes(row)
        header[row[0]] = {"dtype": NAMES[row[1]], "shape": list(row[2]), "data_offsets": [position, end]}
        position = end
    text = canonical(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name, dtype, shape in rows:
        tensor = next(tensors)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise AssertionError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned {dtype} {shape}")
        if count_non_finite(tensor):
            raise ArtifactError(f"{name} would hold NaN or infinite values; nothing was published.")
        out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Checkpoint]:
    """A checkpoint that lets go of its files at the end."""
    checkpoint = Checkpoint(folder)
    try:
        yield checkpoint
    finally:
        checkpoint.close()
