"""Merges a LoRA adapter, as peft writes it, into the seed: W + s B A, block by block, which gives a dense expert.

s = alpha / r, or alpha / √r with `use_rslora` (Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732). With
`use_dora` each row of that sum is rescaled to the adapter's magnitude (Liu et al., arXiv 2402.09353). Anything else
(biases, other adapter types, weights that the seed lacks) is refused by name; `lora_config` checks the options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from btx.checkpoints.layouts import holds_weights
from btx.checkpoints.names import BY_TOKEN, EMBEDDING, HEAD
from btx.checkpoints.reader import BLOCK, Checkpoint, Tensors, count_non_finite
from btx.checkpoints.token_map import MODEL_FILES, tokenizer_digest
from btx.checkpoints.validate import DTYPES, read_header, refuse_links, refuse_scripts
from btx.checkpoints.writer import TensorSpec
from btx.errors import ArtifactError
from btx.merge.lora_config import CONFIG, LoraOptions

WEIGHTS, PICKLE, TOKENIZER = "adapter_model.safetensors", "adapter_model.bin", "tokenizer.json"
PREFIX = "base_model.model."
PART = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight|(?<=vector))")
BASE = ".base_layer.weight"  # how peft stores a head that has factors
MAGNITUDE = "magnitude_vector"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter instead of a model; a config.json may lie beside it."""
    return (folder / CONFIG).is_file() and not holds_weights(folder)


class Adapter:
    """An open adapter: for each weight of the seed that it changes, its factors or its replacement."""

    def __init__(self, folder: Path) -> None:
        refuse_links(folder)
        refuse_scripts(folder)
        self.folder, self.options = folder, LoraOptions(folder)
        if not (folder / WEIGHTS).is_file():
            if (folder / PICKLE).is_file():
                raise ArtifactError(
                    f"{folder} holds its weights as pickle ({PICKLE}), which can run code. If you trust it, save the "
                    "adapter again: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
                )
            raise ArtifactError(f"{folder} has no {WEIGHTS}. Save the adapter by save_pretrained(folder).")
        self.tensors = Tensors(folder, read_header(folder / WEIGHTS))
        # By the seed's weight: the file's names of A and B (and DoRA's magnitudes), or of the whole tensor.
        self.factors: dict[str, dict[str, str]] = {}
        self.replaced: dict[str, str] = {}
        self.bases: dict[str, str] = {}  # whole tensors to which factors are added
        for name in self.tensors.entries:
            if part := PART.fullmatch(name):
                self.factors.setdefault(f"{part[1]}.weight", {})[part[2]] = name
            elif name.endswith(BASE):
                self.bases[name.removeprefix(PREFIX).removesuffix(BASE) + ".weight"] = name
            else:
                self.replaced[name.removeprefix(PREFIX)] = name

    def require_fit(self, seed: Checkpoint) -> None:
        """ArtifactError unless every tensor belongs to a weight of the seed, with its shape, and is finite.

        A tokenizer that lies beside the adapter must be the seed's.
        """
        own = any((self.folder / name).is_file() for name in MODEL_FILES)
        if own and tokenizer_digest(self.folder, seed.config) != tokenizer_digest(seed.folder):
            raise ArtifactError(
                f"{self.folder}: its {TOKENIZER} has other tokens than that of the seed ({seed.folder}), which the "
                "expert would lose. Merge the adapter yourself (peft's merge_and_unload, then save_pretrained, with "
                f"this tokenizer) and name the dense folder; or remove {TOKENIZER}, if they were not used."
            )
        for weight in self.factors:
            self._require_factors(seed, weight)
        if any(".lora_embedding_" in name for name in self.replaced):
            raise self.options.refused("target_modules", "which puts factors on the embedding")
        for weight, name in self.replaced.items():
            self._require_replaced(seed, weight, name)
        for weight, name in self.bases.items():
            self._require_replaced(seed, weight, name)
            if weight not in self.factors:
                raise ArtifactError(f"{self.folder} holds {name} without factors. Save the adapter again.")
        self._require_all(seed)
        for name in self.tensors.entries:
            if bad := sum(map(count_non_finite, self.tensors.blocks(name))):
                raise ArtifactError(
                    f"{self.folder}: {name} holds {bad} NaN or infinite values. Use an earlier adapter."
                )

    def _require_factors(self, seed: Checkpoint, weight: str) -> None:
        """ArtifactError unless the factors of a weight fit it, and are those that peft would put there."""
        parts = self.factors[weight]
        shapes = {k: self.tensors.entries[n].shape for k, n in parts.items()}
        base = seed.entries[weight].shape if weight in seed.entries else None
        a, b, module = shapes.get("A", ()), shapes.get("B", ()), weight.removesuffix(".weight")
        if weight == HEAD and base is None and EMBEDDING in seed.entries:
            raise ArtifactError(
                f"{self.folder} changes {HEAD}, which is tied to the embedding in the seed ({seed.folder}): merging "
                "would untie them. Train it on other modules (target_modules without lm_head)."
            )
        if base is None or len(a) != 2 or len(b) != 2 or (b[0], a[1]) != base or a[0] != b[1]:
            raise ArtifactError(
                f"{self.folder}: lora_A {a or 'none'} and lora_B {b or 'none'} do not fit {weight}, which is "
                f"{base or 'missing'} in the seed ({seed.folder}). Use an adapter that was trained on this seed."
            )
        if not self.options.selects(module, linear(seed)):
            raise self.options.refused("target_modules", f"which does not select {module} although it has factors")
        if a[0] != self.options.rank(module):
            raise self.options.refused(
                "r", f"by which {module} has rank {self.options.rank(module)}, in the file {a[0]}"
            )
        wanted = (base[0],) if self.options.dora else None
        if shapes.get(MAGNITUDE) != wanted:
            raise self.options.refused("use_dora", f"but {module}'s magnitudes are {shapes.get(MAGNITUDE) or 'none'}")
        if weight in self.replaced:
            raise ArtifactError(f"{self.folder} holds {weight} whole and as factors. Save the adapter again.")

    def _require_replaced(self, seed: Checkpoint, weight: str, name: str) -> None:
        """ArtifactError unless a whole tensor is one of the seed's, and no other is tied to it."""
        shape, module = self.tensors.entries[name].shape, weight.rpartition(".")[0]
        if not name.startswith(PREFIX) or weight not in seed.entries or seed.entries[weight].shape != shape:
            raise ArtifactError(
                f"{self.folder}: {name} is neither a LoRA factor nor, by name and shape, a weight of the seed "
                f"({seed.folder}). Train it on linear layers, without resizing embeddings."
            )
        if weight not in self.factors and self.options.selects(module, linear(seed)):
            raise self.options.refused("target_modules", f"which selects {module}, for which the file has no factors")
        if weight == EMBEDDING and HEAD not in seed.entries and self._saves(weight):
            raise self.options.refused("modules_to_save", "which unties the embedding from the head")

    def _saves(self, weight: str) -> bool:
        """Whether a weight belongs to a module that is trained in full."""
        return any(weight.rpartition(".")[0].endswith(name) for name in self.options.saved)

    def _require_all(self, seed: Checkpoint) -> None:
        """ArtifactError for a module that the adapter should hold and does not, where that changes the expert."""
        missing = [n for n in seed.entries if self._saves(n) and n not in self.replaced]
        if missing:
            raise self.options.refused("modules_to_save", f"but {missing[0]} is not in {WEIGHTS}")
        if self.options.config.get("init_lora_weights", True) is False:
            known = linear(seed)
            for module in known:
                if self.options.selects(module, known) and f"{module}.weight" not in self.factors:
                    raise self.options.refused("init_lora_weights", f"but there are no factors for {module}")

    def rows(self, seed: Checkpoint) -> list[TensorSpec]:
        """The tensors of the dense model: those of the seed, changed where the adapter says so."""
        found = []
        for name, entry in seed.entries.items():
            make = partial(seed.blocks, name)
            if name in self.replaced:
                make = partial(self._replaced, name, DTYPES[entry.dtype])
            elif name in self.factors:
                make = partial(self._adapted, seed, name)
            found.append(TensorSpec(name, DTYPES[entry.dtype], entry.shape, make))
        return found

    def _replaced(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for block in self.tensors.blocks(self.replaced[name]):
            yield block.to(dtype)

    def _base(self, seed: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of the weight that factors are added to, in the seed's dtype."""
        if name in self.bases:
            return self.tensors.flat(self.bases[name], start, stop).to(DTYPES[seed.entries[name].dtype])
        return seed.flat(name, start, stop)

    def _adapted(self, seed: Checkpoint, name: str) -> Iterator[torch.Tensor]:
        """W + s B A in fp32, some rows at a time, cast once; with DoRA each row is multiplied by m / |W + s B A|."""
        parts = {part: self.tensors.read(tensor).float() for part, tensor in self.factors[name].items()}
        rows, columns = seed.entries[name].shape
        step, scale = max(1, BLOCK // columns), self.options.scale(name.removesuffix(".weight"))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            base = self._base(seed, name, start * columns, stop * columns).view(-1, columns)
            made = torch.addmm(base.float(), parts["B"][start:stop], parts["A"], alpha=scale)
            if self.options.dora:
                made *= (parts[MAGNITUDE][start:stop] / torch.linalg.norm(made, dim=1))[:, None]
            yield made.to(base.dtype)


def linear(seed: Checkpoint) -> list[str]:
    """The modules of a seed that are linear layers, without the head, as peft counts them."""
    names = (n for n, e in seed.entries.items() if len(e.shape) == 2 and n not in BY_TOKEN)
    return [name.removesuffix(".weight") for name in names]
