"""A Mixture-of-Experts folder: its experts by name, its routers, its layers with and without experts.

Everything is validated when a folder is opened: numbers in its config, names of its experts, and that every router and
expert exists with its shape. So a damaged folder is refused before anything is written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.validate import DTYPES
from btx.errors import ArtifactError, RecipeError, nearest
from btx.models.families import MOE, mixture_family
from btx.models.family import DOWN, LAYER, UP, Constant, Family
from btx.models.native import native_config
from btx.models.stored import layers_with_experts

EXPERTS = "experts.json"  # the experts' names, in order
OWN = "own"  # in it, of a merge of mixtures: how many experts each model has, and how many of them a token visits
Source = Callable[[str, str], Iterator[torch.Tensor]]  # (model.layers.L., dense name) -> blocks of an expert's tensor
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def expert_blocks(checkpoint: Checkpoint, family: Family, name: str, number: int, count: int) -> Iterator[torch.Tensor]:
    """A tensor of expert `number` of `count`, in blocks; `name` is model.layers.L. and the dense name."""
    match = LAYER.fullmatch(name)
    assert match
    kind = match[2]
    stored = name.removesuffix(kind) + family.expert[kind]
    if not family.stacked:
        return checkpoint.blocks(stored.format(e=number))
    size = checkpoint.entries[stored].count // count
    start = number * size
    if kind != DOWN:  # gate above up
        size //= 2
        start += size * (kind == UP)
    return checkpoint.blocks(stored, start, start + size)


class Moe:
    """An open Mixture-of-Experts folder: its family, its experts by name, its routers.

    Where the folder holds the experts fused, `layout` is `fused` and the family has the names in memory, under which a
    changed folder is written too.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        family = mixture_family(config)
        if family is None:
            raise ArtifactError(
                f"{checkpoint.folder} is a {config['model_type']}, not a Mixture of Experts that btx writes "
                f"({', '.join(MOE)})."
            )
        self.checkpoint, self.config = checkpoint, config
        if family.attention:
            raise ArtifactError(
                f"{checkpoint.folder} is a {family.moe}, whose attention has experts too, and `btx moe` "
                "changes feed-forward experts only. Merge it again, with merge.experts: per_model."
            )
        rests = {match[2] for name in checkpoint.entries if (match := LAYER.fullmatch(name))}
        self.layout = "fused" if family.fused.expert[DOWN] in rests else "published"
        self.family: Family = family.fused if self.layout == "fused" else family
        fields = (self.family.experts_field, "num_local_experts")
        self.count_field = next((f for f in fields if f in config), fields[0])
        self.count = number_in(checkpoint, self.count_field)
        self.width = number_in(checkpoint, self.family.width_field)
        self.hidden = number_in(checkpoint, "hidden_size")
        self._depth = number_in(checkpoint, "num_hidden_layers")
        number_in(checkpoint, self.family.top_k_field, self.count)
        self.native = native_config(config, str(checkpoint.folder))
        self._sparse = self._layers()
        patterns_ = [p for f in (family, family.fused) for p in patterns(f).values()]
        require_shapes(checkpoint, self._shapes(), lambda rest: any(p.fullmatch(rest) for p in patterns_))
        self.layers = list(self._sparse)  # with experts
        self.dense = sorted({*range(self._depth)} - {*self.layers})
        if not self.layers:
            raise ArtifactError(f"{checkpoint.folder} has experts in no layer. Fetch the folder again.")
        self.names = expert_names(checkpoint.folder, self.count)

    def _layers(self) -> Sequence[int]:
        """The layers with experts by the config; those that are not stored where it claims more layers than are."""
        stored = max(
            (int(match[1]) for name in self.checkpoint.entries if (match := LAYER.fullmatch(name))), default=-1
        )
        if stored < self._depth - 1:
            return range(stored + 1, self._depth)
        where = f"{self.checkpoint.folder}/config.json"
        _require_layers_known(self.config, self.family, where)
        return layers_with_experts(self.native, where)

    def _shapes(self) -> Shapes:
        """Every router and expert tensor, with its shape."""
        together = Counter(self.family.expert.values())
        for layer in self._sparse:
            yield self.family.router_name(layer), (self.count, self.hidden)
            for kind, name in self.family.expert.items():
                published, (rows, columns) = f"model.layers.{layer}.{name}", self.shape(kind)
                if self.family.stacked:
                    yield published, (self.count, together[name] * rows, columns)
                else:
                    yield from ((published.format(e=e), (rows, columns)) for e in range(self.count))
            for name, of in self.of_experts.items():
                yield f"model.layers.{layer}.{name}", of.sizes(self.count, self.hidden)

    @property
    def of_experts(self) -> dict[str, Constant]:
        """The further tensors of a layer that have an entry for every expert, by their names in this layout."""
        found = {name: of for name, of in self.family.constants.items() if "E" in of.shape and of.within(self.native)}
        return {of.memory if self.layout == "fused" and of.memory else name: of for name, of in found.items()}

    def index(self, name: str) -> int:
        """The number of an expert, by its name or by that number; RecipeError for an unknown one."""
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and int(name) < self.count:
            return int(name)
        raise RecipeError(f"{self.checkpoint.folder} has no expert {name!r}; {nearest(name, self.names)}")

    def numbers(self, names: Iterable[str]) -> list[int]:
        """The numbers of experts, in order; `law` also stands for all of `law.0`, `law.1`, ... if it is no expert."""
        found: set[int] = set()
        for name in names:
            below = re.compile(re.escape(name) + r"\.\d+")
            many = [e for e, one in enumerate(self.names) if below.fullmatch(one)]
            found |= {*many} if many and name not in self.names else {self.index(name)}
        return sorted(found)

    def expert(self, number: int) -> Source:
        """The source of an expert's tensors."""
        return partial(self._pieces, number)

    def _pieces(self, number: int, prefix: str, kind: str) -> Iterator[torch.Tensor]:
        return expert_blocks(self.checkpoint, self.family, prefix + kind, number, self.count)

    def dtype(self, number: int, prefix: str, kind: str) -> torch.dtype:
        """The dtype of an expert's tensor."""
        return DTYPES[self.checkpoint.entries[(prefix + self.family.expert[kind]).format(e=number)].dtype]

    def router(self, layer: int) -> torch.Tensor:
        """A layer's router weight (E, D)."""
        return self.checkpoint.read(self.family.router_name(layer))

    def shape(self, kind: str) -> tuple[int, int]:
        """Shape of one expert's tensor."""
        return (self.hidden, self.width) if kind == DOWN else (self.width, self.hidden)


def patterns(family: Family) -> dict[str, re.Pattern[str]]:
    """The published name of each kind of expert tensor as a pattern, the gate before the up that may share it."""
    return {k: re.compile(re.escape(n).replace(r"\{e\}", r"(?P<e>\d+)")) for k, n in family.expert.items()}


def number_in(checkpoint: Checkpoint, field: str, most: int | None = None) -> int:
    """A positive integer of the config, at most `most`; ArtifactError for anything else."""
    value = checkpoint.config.get(field)
    if type(value) is int and 1 <= value <= (most or value):
        return value
    allowed = f"from 1 to {most}" if most else "above 0"
    raise ArtifactError(
        f"{checkpoint.folder}/config.json has {field} = {value!r:.80}, where a whole number {allowed} belongs. "
        "Fetch the folder again."
    )


def _require_layers_known(config: dict[str, Any], family: Family, where: str) -> None:
    """ArtifactError for layers without experts that the class does not understand."""
    found = config.get("mlp_only_layers") or []
    if not isinstance(found, list) or not all(type(n) is int for n in found) or (found and not family.dense_layers):
        raise ArtifactError(
            f"{where} has mlp_only_layers = {found!r:.80}, which is not a list of layers, or its class has no such "
            "layers. Fetch the folder again."
        )


def require_shapes(checkpoint: Checkpoint, wanted: Shapes, belongs: Callable[[str], bool]) -> None:
    """ArtifactError unless these tensors exist with these shapes, and no other one belongs to an expert.

    `belongs` decides by the name below `model.layers.L.`. A config that claims too much ends at the first missing one.
    """
    names = set()
    for name, shape in wanted:
        entry = checkpoint.entries.get(name)
        if entry is None or entry.shape != shape:
            seen = "missing" if entry is None else "x".join(map(str, entry.shape))
            raise ArtifactError(
                f"{checkpoint.folder}: {name} is {seen}, by config.json it should be {'x'.join(map(str, shape))}. "
                "Fetch the folder again."
            )
        names.add(name)
    for name in checkpoint.entries.keys() - names:
        if (match := LAYER.fullmatch(name)) and belongs(match[2]):
            raise ArtifactError(
                f"{checkpoint.folder}: {name} belongs to no expert that config.json counts. Fetch the folder again."
            )


def own_in(folder: Path) -> tuple[int, int]:
    """How many experts a model has in a mixture that the pipeline made, and how many of them a token visits: 1 and 1,
    unless the models were mixtures."""
    each, visited = json.loads((folder / EXPERTS).read_text(encoding="utf-8")).get(OWN, (1, 1))
    return int(each), int(visited)


def branches_in(folder: Path) -> list[str]:
    """The names of what a recipe counts as one expert, in a mixture that the pipeline made."""
    names: list[str] = json.loads((folder / EXPERTS).read_text(encoding="utf-8"))["experts"]
    each, _ = own_in(folder)
    return names if each == 1 else [name.rpartition(".")[0] for name in names[::each]]


def expert_names(folder: Path, count: int) -> list[str]:
    """The experts' names from the folder's experts.json, or their numbers without it."""
    path = folder / EXPERTS
    if not path.is_file():
        return [str(n) for n in range(count)]
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["experts"]
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError("its experts are not a list of names")
        if len(names) != count:
            raise ValueError(f"it names {len(names)} experts, config.json {count}")
        if len(set(names)) < count:
            raise ValueError("a name appears twice")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Fetch the folder again, or remove that file.") from error
    return list(names)
