"""The merge: feed-forward blocks become experts, every other tensor is averaged; tensor by tensor.

Pure functions over open checkpoints. Never more than one tensor of each model is in memory; sums are taken in
fp32 in the order of the models and cast once (averaging in bf16 rounds a quarter of the weights wrongly).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from btx.checkpoint import Checkpoint, Planned, write_weights
from btx.errors import ArtifactError, RecipeError
from btx.families import DOWN, LAYER, Family, family_of, moe_config
from btx.settings import MergeSettings, SharedSettings

SEED = "seed"


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Unweighted mean in fp32, summed in order."""
    total = tensors[0].to(torch.float32, copy=True)
    for tensor in tensors[1:]:
        total += tensor
    return total.div_(len(tensors))


def shared(
    tensors: dict[str, torch.Tensor], base: torch.Tensor, settings: SharedSettings, *, name: str, seed: int
) -> torch.Tensor:
    """One tensor out of the models' ones, in fp32, by the method that the recipe names.

    `tensors` by model name; `base` is the seed's own tensor, from which ties, dare_ties and model_stock take the
    differences. All but `mean` are mergekit's. The random mask of DARE depends on `seed` and `name` only.
    """
    if settings.method == "mean":
        return mean(list(tensors.values()))
    from mergekit.merge_methods import merge_tensors

    names = list(tensors)
    full = [tensors[n].to(torch.float32) for n in names]
    weight = [settings.weights.get(n, 1.0) for n in names]
    if settings.method == "linear":
        return merge_tensors(full, "linear", parameters={"weight": weight}).contiguous()  # type: ignore[no-any-return]
    if settings.method == "slerp":
        return merge_tensors(full, "slerp", parameters={"t": settings.t}, base_index=0)  # type: ignore[no-any-return]
    keep = [i for i, n in enumerate(names) if n != SEED]
    ids = [SEED, *(names[i] for i in keep)]
    parameters: dict[str, object] = {}
    if settings.method in ("ties", "dare_ties"):
        parameters = {"weight": {names[i]: weight[i] for i in keep}, "density": settings.density}
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        return merge_tensors(  # type: ignore[no-any-return]
            [base.to(torch.float32), *(full[i] for i in keep)], settings.method, ids=ids, base_index=0,
            parameters=parameters,
        )  # fmt: skip


def require_same(seed: Checkpoint, other: Checkpoint, who: str) -> None:
    """ArtifactError with the list of what differs unless two checkpoints have the same tensors and shapes."""
    mine = {n: e.shape for n, e in seed.entries.items()}
    theirs = {n: e.shape for n, e in other.entries.items()}
    wrong = [
        f"{n}: seed {mine.get(n, 'none')}, {who} {theirs.get(n, 'none')}"
        for n in sorted(mine.keys() | theirs.keys())
        if mine.get(n) != theirs.get(n)
    ]
    if wrong:
        raise ArtifactError(
            f"{who} ({other.folder}) is no descendant of the seed ({seed.folder}): {len(wrong)} tensors "
            f"differ in presence or shape, first {'; '.join(wrong[:3])}."
        )


@dataclass(frozen=True)
class Experts:
    """How the models' feed-forward blocks are laid out as MoE experts: one each, split in chunks, or blended.

    split (paper, section on expert splitting): each block is cut into `chunks` of width F/C; the output projection is
    multiplied by C so that equal gates over all N·C chunks give the mean of the models' outputs.
    blend: the n-th expert is made of the n-th chunk (of N) of every model; the output projection is multiplied so
    that equal gates over all N experts give the mean of the models' outputs (the factor is 1).
    """

    form: str
    models: int
    chunks: int
    width: int

    @property
    def count(self) -> int:
        """Number of MoE experts."""
        return self.models * self.chunks if self.form == "split" else self.models

    @property
    def expert_width(self) -> int:
        """Feed-forward width of one MoE expert."""
        return self.width // self.chunks if self.form == "split" else self.width

    def tensor(self, models: list[torch.Tensor], expert: int, dense_name: str) -> torch.Tensor:
        """One feed-forward tensor of MoE expert `expert`, from the models' tensors of that name."""
        axis = 1 if dense_name == DOWN else 0
        if self.form == "one":
            return models[expert]
        if self.form == "split":
            part = models[expert // self.chunks].chunk(self.chunks, axis)[expert % self.chunks]
            return part.to(torch.float32) * self.chunks if axis else part
        return torch.cat([m.chunk(self.models, axis)[expert] for m in models], axis)


def layout(settings: MergeSettings, models: int, width: int) -> Experts:
    """The expert layout of a recipe; RecipeError when the feed-forward width cannot be cut that way."""
    chunks = settings.chunks if settings.experts == "split" else models if settings.experts == "blend" else 1
    if width % chunks:
        raise RecipeError(
            f"merge.experts: {settings.experts} cuts the feed-forward width {width} into {chunks} chunks, "
            "which does not come out even. Choose another number of chunks."
        )
    return Experts(settings.experts, models, chunks if settings.experts == "split" else 1, width)


def write_average(out: Path, models: Mapping[str, Checkpoint], base: Checkpoint, settings: MergeSettings) -> None:
    """Write the dense average of all models (feed-forward blocks too) as weights in `out`."""
    dtype = settings.torch_dtype(base.dtype)
    plan: list[Planned] = [(n, dtype, e.shape) for n, e in base.entries.items()]
    write_weights(out, plan, (_shared(n, models, base, settings).to(dtype) for n in base.entries))


def _shared(name: str, models: Mapping[str, Checkpoint], base: Checkpoint, settings: MergeSettings) -> torch.Tensor:
    tensors = {n: m.read(name) for n, m in models.items()}
    return shared(tensors, base.read(name), settings.shared, name=name, seed=settings.seed)


@dataclass(frozen=True)
class _Output:
    name: str
    shape: tuple[int, ...]
    source: str  # dense tensor it is made of, or the norm that the router's scale depends on
    expert: int | None = None
    router: bool = False


def _outputs(base: Checkpoint, family: Family, experts: Experts) -> Iterator[_Output]:
    for name, entry in base.entries.items():
        match = LAYER.fullmatch(name)
        if not match or match[2] not in family.expert:
            yield _Output(name, entry.shape, name)
        else:
            axis = 1 if match[2] == DOWN else 0
            shape = tuple(experts.expert_width if a == axis else s for a, s in enumerate(entry.shape))
            for e in range(experts.count):
                published = f"model.layers.{match[1]}.{family.expert[match[2]].format(e=e)}"
                yield _Output(published, shape, name, expert=e)
        if match and match[2] == family.norm:
            yield _Output(family.router_name(int(match[1])), (experts.count, *entry.shape), name, router=True)


def write_moe(
    out: Path, models: Mapping[str, Checkpoint], base: Checkpoint, settings: MergeSettings, top_k: int
) -> None:
    """Write the merged Mixture of Experts (config and weights, published per-expert names) into `out`.

    `models` by name, in the order that the experts have; `base` the seed, whether or not it is among them.
    """
    family = family_of(base.config, str(base.folder))
    experts = layout(settings, len(models), base.config["intermediate_size"])
    if not 1 <= top_k <= experts.count:
        raise RecipeError(
            f"finetune.top_k is {top_k}, but the merge makes {experts.count} experts. Choose 1 to {experts.count}."
        )
    config = moe_config(
        base.config, experts=experts.count, top_k=top_k, width=experts.expert_width, where=str(base.folder)
    )
    dtype = settings.torch_dtype(base.dtype)
    config.dtype = dtype
    config.architectures = [_class_name(config)]
    rows = list(_outputs(base, family, experts))
    plan: list[Planned] = [(row.name, dtype, row.shape) for row in rows]
    write_weights(out, plan, (_make(row, models, base, settings, experts).to(dtype) for row in rows))
    config.save_pretrained(out)


def _class_name(config: object) -> str:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


def _make(
    row: _Output, models: Mapping[str, Checkpoint], base: Checkpoint, settings: MergeSettings, experts: Experts
) -> torch.Tensor:
    if row.router:
        return _router(row, models, base, settings)
    if row.expert is None:
        return _shared(row.name, models, base, settings)
    match = LAYER.fullmatch(row.source)
    assert match
    return experts.tensor([m.read(row.source) for m in models.values()], row.expert, match[2])


def _router(row: _Output, models: Mapping[str, Checkpoint], base: Checkpoint, settings: MergeSettings) -> torch.Tensor:
    """A router row for every expert, scaled by the merged norm in front of it, from a seed that is the layer's own."""
    from btx.routing import init_router

    norm = _shared(row.source, models, base, settings)
    key = int.from_bytes(hashlib.sha256(f"{settings.seed}/{row.name}".encode()).digest()[:7])
    generator = torch.Generator().manual_seed(key)
    return init_router(norm, experts=row.shape[0], entropy=settings.router_entropy, generator=generator)


def distance(seed: Checkpoint, other: Checkpoint) -> dict[str, float]:
    """How far a model has gone from the seed over all its matrices: cosine, and norm of the change over the seed's.

    Independent models have a cosine near 0, descendants near 1. Norm weights are left out: they are all near one.
    """
    dot = mine = theirs = change = 0.0
    for name, entry in seed.entries.items():
        if len(entry.shape) < 2:
            continue
        a, b = seed.read(name).to(torch.float32), other.read(name).to(torch.float32)
        dot += float((a * b).sum(dtype=torch.float64))
        mine += float(a.square().sum(dtype=torch.float64))
        theirs += float(b.square().sum(dtype=torch.float64))
        change += float((b - a).square().sum(dtype=torch.float64))
    return {"cosine": dot / max((mine * theirs) ** 0.5, 1e-30), "change": (change / max(mine, 1e-30)) ** 0.5}
