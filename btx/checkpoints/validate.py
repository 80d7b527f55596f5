"""Validates a checkpoint folder before anything in it is used: its config, links, index and safetensors headers.

Only JSON and the headers of the weights are read here. Code, pickles, quantised weights, hub names and paths outside
the folder are refused, whichever library would have followed them.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from btx.checkpoints.carried import CARRIED, TEMPLATES
from btx.checkpoints.layouts import (
    CONFIG,
    INDEX,
    SINGLE,
    refuse_adapter,
    refuse_integers,
    refuse_no_config,
    refuse_no_weights,
    refuse_pointer,
    refuse_wrapped,
)
from btx.checkpoints.names import SEEING, language_model
from btx.errors import ArtifactError

HEADER_LIMIT = 100 * 2**20  # the limit of the safetensors library itself
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # stored by older checkpoints; it is computed, not a weight
MOST_LAYERS = 10_000
NOTHING: tuple[Any, ...] = (None, False, {}, [], "")  # values under which a key requests nothing
NATIVE = ("eager", "sdpa")  # values of `*_implementation` that need no further package and no hub


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored: its shard, safetensors' name of its dtype, its shape, its byte offset in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the tensor on disk."""
        return self.count * DTYPES[self.dtype].itemsize


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint, after its safety checks; ArtifactError when one fails."""
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder: a checkpoint is a local Hugging Face folder with config.json, "
            "*.safetensors and the tokenizer. Download it first, or correct the path."
        )
    refuse_links(folder)
    path = folder / CONFIG
    if not path.is_file():
        refuse_no_config(folder)
    refuse_adapter(folder)
    for name in CARRIED:
        refuse_pointer(folder / name)
    config: dict[str, Any] = _json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ArtifactError(
            f"{path} names no model_type, so the family of the checkpoint is unknown. Fetch the checkpoint again."
        )
    _refuse_code(folder, config)
    if config["model_type"] in SEEING:
        config = language_model(config, path)
    require_size(config, str(folder))
    if config["model_type"] == "mistral" and "layer_types" in config:
        config["model_type"] = "ministral"  # as AutoConfig does: its sliding-window layers are chosen differently
    return config


def sees_images(folder: Path) -> bool:
    """Whether a checkpoint's model sees images beside text."""
    return bool(_json(folder / CONFIG).get("model_type") in SEEING)


def require_size(config: dict[str, Any], where: str) -> None:
    """ArtifactError for a config that claims absurdly many layers, since every layer is looked at."""
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ArtifactError(
            f"{where}: config.json has num_hidden_layers = {layers}, more than a model has. Fetch the checkpoint again."
        )


def _json(path: Path) -> Any:
    refuse_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}). Fetch the checkpoint again.") from error


def places(folder: Path) -> list[Path]:
    """Where a folder's links may point: into itself and, for a snapshot in a Hugging Face cache, into its blobs."""
    home = folder.resolve()
    snapshots = [p.parent for p in (home, *home.parents) if p.parent.name == "snapshots"]
    return [home, *(p.parent / "blobs" for p in snapshots[:1])]


def refuse_link(path: Path, folder: Path) -> None:
    """ArtifactError for a broken link, or one out of the folder: the same rule for seeds, experts and exports."""
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{path} is a broken link ({error}). Put the file in its place.") from error
    if not any(target.is_relative_to(place) for place in places(folder)):
        raise ArtifactError(
            f"{path} is a link that leaves the checkpoint folder, to {target}. "
            "Put the file itself in its place, if you trust it."
        )
    if not target.exists():
        raise ArtifactError(
            f"{path} is a link to {target}, which is not there. Fetch the file again, or remove the link if it is not "
            "needed."
        )


def refuse_links(folder: Path) -> None:
    """ArtifactError for broken links and links out of the folder; a Hugging Face cache's may point to its own blobs."""
    for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")):
        refuse_link(path, folder)


def refuse_scripts(folder: Path, asked: Sequence[str] = ()) -> None:
    """ArtifactError when a folder contains Python files, or its JSON requests code by the keys in `asked`."""
    scripts = sorted(p.relative_to(folder).as_posix() for p in (*folder.glob("*.py"), *folder.glob("*/*.py")))
    if asked or scripts:
        raise ArtifactError(
            f"{folder} brings its own code ({', '.join(asked or scripts)}); btx runs no code from a "
            "checkpoint. Use a checkpoint of a family that transformers implements."
        )


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    configs = {"config.json": config}
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            configs[name] = _json(folder / name)
            if not isinstance(configs[name], dict):
                raise ArtifactError(f"{folder / name} is not a JSON object. Fetch the checkpoint again.")
    keys = {(key, name) for name, found in configs.items() for key, value in _walk(found) if value not in NOTHING}
    asked = [f"{key} in {name}" for key, name in sorted(keys) if key in ("auto_map", "trust_remote_code")]
    refuse_scripts(folder, asked)
    if config.get("quantization_config") or config.get("compression_config"):
        raise ArtifactError(
            f"{folder} is quantised (quantization_config in config.json); averaging and training "
            "take unquantised weights. Use the unquantised checkpoint."
        )
    for key, value in _walk(config):
        if key.endswith("implementation") and isinstance(value, str) and value not in NATIVE:
            raise ArtifactError(
                f"{folder / 'config.json'} requests an implementation from a further package or a hub "
                f"({key}: {value!r}). Remove that key."
            )


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield str(key), item
        yield from _walk(item)


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a folder by name, from the headers alone, in their order on disk.

    ArtifactError when they do not make up one model.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise ArtifactError(
            f"{folder} has both {SINGLE} and {INDEX}: it is not clear which holds the model. "
            "Remove the one that does not."
        )
    if not single.is_file() and not index.is_file():
        refuse_no_weights(folder)
    entries = read_header(single) if single.is_file() else _read_shards(folder, index)
    if not entries:
        raise ArtifactError(f"{folder} holds no tensors. Fetch the checkpoint again.")
    refuse_wrapped(folder, entries)
    return dict(sorted(entries.items(), key=lambda item: (item[1].file, item[1].offset)))


def _read_shards(folder: Path, index: Path) -> dict[str, Entry]:
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    wrong: set[str] = set()
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w.+-]+\.safetensors", shard):
            raise ArtifactError(
                f"{index} names a file outside the folder or of another kind: {shard!r}. "
                "Shards must lie beside the index as *.safetensors."
            )
        if not (folder / shard).is_file():
            raise ArtifactError(f"{index} names {shard}, which is missing. Fetch the checkpoint again.")
        found = read_header(folder / shard)
        wrong |= {name for name in found if weight_map.get(name) != shard}
        entries |= found
    wrong |= weight_map.keys() - entries.keys()
    if wrong:
        raise ArtifactError(
            f"{index} and the shards disagree on {len(wrong)} tensors, first {sorted(wrong)[:3]}. "
            "Fetch the checkpoint again."
        )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    found = _json(index)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ArtifactError(f"{index} has no weight_map from tensors to files. Fetch the checkpoint again.")
    return weight_map


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; ArtifactError when the file is damaged or holds other dtypes."""
    size = path.stat().st_size
    refuse_pointer(path)
    try:
        with path.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if not 0 < length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        entries = {
            n: Entry(path.name, t["dtype"], _shape(n, t["shape"]), 8 + length + t["data_offsets"][0])
            for n, t in header.items()
        }
        _check_dtypes(path, entries)
        _check_offsets(header, entries, size - 8 - length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ArtifactError(f"{path} ({size} bytes) is damaged: {error}. Fetch it again.") from error
    return entries


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has the shape {shape!r:.80}")
    return tuple(shape)


def _check_dtypes(path: Path, entries: dict[str, Entry]) -> None:
    for name, entry in entries.items():
        if entry.dtype not in DTYPES and not BUFFERS.search(name):
            refuse_integers(path, name, entry.dtype)
            raise ArtifactError(
                f"{path}: {name} has dtype {entry.dtype}; weights must be one of {', '.join(DTYPES)}. Use the "
                "unquantised checkpoint: others cannot be averaged or trained."
            )


def _check_offsets(header: dict[str, Any], entries: dict[str, Entry], body: int) -> None:
    position = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = tensor["data_offsets"]
        if start != position or (entries[name].dtype in DTYPES and end - start != entries[name].size):
            raise ValueError(f"{name} lies at {start}..{end}, which does not fit its shape or its neighbour")
        position = end
    if position != body:
        raise ValueError(f"it should hold {position} bytes of weights and holds {body}")
