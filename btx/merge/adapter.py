"""LoRA adapters of a seed, as peft writes them: W + s B A, block by block, so that an adapter becomes a dense expert.

s = alpha / r, or alpha / √r with `use_rslora` (Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732). What an
adapter may be besides (DoRA, biases, another kind than LoRA, weights that the seed does not have) is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btx.checkpoint import BLOCK, Checkpoint, Tensors, count_non_finite, tokenizer_digest
from btx.errors import ArtifactError
from btx.safety import DTYPES, read_header, refuse_links, refuse_scripts
from btx.shards import Row

CONFIG, WEIGHTS, TOKENIZER = "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"
PREFIX = "base_model.model."
PART = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight")
IDLE: dict[str, tuple[Any, ...]] = {  # fields that must have one of these values, under which they do nothing
    "use_dora": (None, False),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others change the seed's weights
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter instead of a model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


class Adapter:
    """An open adapter: for each weight of the seed that it changes, its factors and their scale."""

    def __init__(self, folder: Path) -> None:
        refuse_links(folder)
        refuse_scripts(folder)
        self.folder, self.config = folder, _config(folder)
        if not (folder / WEIGHTS).is_file():
            raise ArtifactError(f"{folder} has no {WEIGHTS}. Save the adapter by save_pretrained(folder).")
        self.tensors = Tensors(folder, read_header(folder / WEIGHTS))
        self.factors: dict[str, dict[str, str]] = {}  # weight of the seed -> A and B by their names in the file
        self.replaced: dict[str, str] = {}  # weight of the seed -> name in the file
        for name in self.tensors.entries:
            if part := PART.fullmatch(name):
                self.factors.setdefault(f"{part[1]}.weight", {})[part[2]] = name
            else:
                self.replaced[name.removeprefix(PREFIX)] = name

    def scale(self, weight: str, rank: int) -> float:
        """s of a weight: alpha over the rank or, with use_rslora, over its root."""
        module = weight.removesuffix(".weight")
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def require_fit(self, seed: Checkpoint) -> None:
        """ArtifactError unless every tensor belongs to a weight of the seed, with its shape, and is finite.

        A tokenizer that lies beside the adapter must be the seed's.
        """
        if (self.folder / TOKENIZER).is_file() and tokenizer_digest(self.folder) != tokenizer_digest(seed.folder):
            raise ArtifactError(
                f"{self.folder}: its {TOKENIZER} has other tokens than that of the seed ({seed.folder}), which the "
                "expert would lose. Merge the adapter yourself (peft's merge_and_unload, then save_pretrained, with "
                f"this tokenizer) and name the dense folder; or remove {TOKENIZER}, if they were not used."
            )
        for weight, parts in self.factors.items():
            shapes = {k: self.tensors.entries[n].shape for k, n in parts.items()}
            base = seed.entries[weight].shape if weight in seed.entries else None
            a, b = shapes.get("A", ()), shapes.get("B", ())
            if base is None or len(a) != 2 or len(b) != 2 or (b[0], a[1]) != base or a[0] != b[1]:
                raise ArtifactError(
                    f"{self.folder}: lora_A {a or 'none'} and lora_B {b or 'none'} do not fit {weight}, which is "
                    f"{base or 'missing'} in the seed ({seed.folder}). Use an adapter that was trained on this seed."
                )
        for weight in self.replaced:
            if (
                weight not in seed.entries
                or seed.entries[weight].shape != self.tensors.entries[self.replaced[weight]].shape
            ):
                raise ArtifactError(
                    f"{self.folder}: {self.replaced[weight]} is no LoRA factor, and no weight of the seed "
                    f"({seed.folder}) by name and shape. Train it on linear layers, without resizing embeddings."
                )
        for name in self.tensors.entries:
            if bad := sum(map(count_non_finite, self.tensors.blocks(name))):
                raise ArtifactError(
                    f"{self.folder}: {name} holds {bad} NaN or infinite values. Use an earlier adapter."
                )

    def rows(self, seed: Checkpoint) -> list[Row]:
        """The tensors of the dense model: those of the seed, changed where the adapter says so."""
        found = []
        for name, entry in seed.entries.items():
            make = partial(seed.blocks, name)
            if name in self.replaced:
                make = partial(self._replaced, name, DTYPES[entry.dtype])
            elif name in self.factors:
                make = partial(self._adapted, seed, name)
            found.append(Row(name, DTYPES[entry.dtype], entry.shape, make))
        return found

    def _replaced(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for block in self.tensors.blocks(self.replaced[name]):
            yield block.to(dtype)

    def _adapted(self, seed: Checkpoint, name: str) -> Iterator[torch.Tensor]:
        """W + s B A in fp32, some rows at a time, cast once."""
        a, b = (self.tensors.read(self.factors[name][part]).float() for part in "AB")
        rows, columns = seed.entries[name].shape
        step, scale = max(1, BLOCK // columns), self.scale(name, len(a))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            base = seed.flat(name, start * columns, stop * columns).view(-1, columns)
            yield torch.addmm(base.float(), b[start:stop], a, alpha=scale).to(base.dtype)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, alpha = config["peft_type"], float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged, or of another kind than LoRA ({error!r}).") from error
    if kind != "LORA" or not math.isfinite(alpha):
        raise ArtifactError(f"{path} says peft_type {kind!r}, lora_alpha {alpha}; only LoRA adapters become experts.")
    for field, values in IDLE.items():
        if config.get(field) not in values:
            raise ArtifactError(
                f"{path} has {field}: {config[field]!r}, which is more than W + s B A. Merge the adapter yourself "
                "(peft's merge_and_unload, then save_pretrained), and name the dense folder."
            )
    return dict(config)
