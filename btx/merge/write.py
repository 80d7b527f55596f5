"""The merge: feed-forward blocks become experts, every other tensor is averaged; block by block.

Open checkpoints are read so that one block of each is in memory at a time, whatever their size (one whole tensor of
each where the averaging method is not elementwise). Sums are taken in fp32 in the order of the models and cast once:
averaging in bf16 rounds a quarter of the weights wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.writer import Meter, Resume, TensorSpec, write_weights
from btx.errors import RecipeError
from btx.merge.averaging import SharedTensors
from btx.merge.canonical import joined
from btx.merge.expert_rows import expert_rows
from btx.merge.layout import BESIDE_SHARED, Experts, layout
from btx.merge.mixtures import mixture_rows
from btx.merge.router_random import RouterScales, random_rows, scale_of
from btx.merge.vocabulary import JointVocabulary
from btx.models.families import DENSE, family_of, mixture_family
from btx.models.family import DOWN, IDLE_WIDTH, KEY, LAYER, OUTPUT, QUERY, VALUE, AttentionExperts, Family
from btx.models.target import class_name
from btx.recipe.merge_settings import MergeSettings

SEED = "seed"


def write_average(
    out: Path, models: Mapping[str, Checkpoint], base: Checkpoint, settings: MergeSettings,
    resume: Resume | None = None, progress: Meter | None = None, joint: JointVocabulary | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write the dense average of all models (feed-forward blocks too) as weights in `out`; returns files' SHA-256."""
    shared_ = SharedTensors(models, base, settings, joint)
    rows = [TensorSpec(n, shared_.dtype, shared_.shape(n), partial(shared_.pieces, n)) for n in base.entries]
    if not mixture_family(base.config):
        rows = joined(DENSE[base.config["model_type"]], rows)
    return write_weights(out, rows, resume=resume, progress=progress)


def write_moe(
    out: Path, models: Mapping[str, Checkpoint], base: Checkpoint, settings: MergeSettings, top_k: int,
    resume: Resume | None = None, progress: Meter | None = None, joint: JointVocabulary | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write the merged Mixture of Experts (config and weights, published names) into `out`; returns files' SHA-256.

    A token visits `top_k` experts, or so many times those of a seed that is a mixture.
    `models` by name, in expert order; `base` is the seed, whether or not it is among them; both are trimmed by `joint`
    if some models added tokens.
    """
    family = family_of(base.config, str(base.folder), attention=settings.attention)
    experts = layout(settings, list(models), base.config, str(base.folder))
    if not 1 <= top_k <= (most := len(experts.branches)):
        raise RecipeError(f"finetune.top_k is {top_k}, but the merge makes {most} experts. Choose 1 to {most}.")
    config = experts.config(base.config, top_k, str(base.folder))
    shared_ = SharedTensors(models, base, settings, joint)
    config.dtype = shared_.dtype
    config.architectures = [class_name(config)]
    rows = mixture_rows if experts.own else moe_rows
    digests = write_weights(out, rows(family, experts, shared_), resume=resume, progress=progress)
    config.save_pretrained(out)
    return digests


def moe_rows(family: Family, experts: Experts, shared_: SharedTensors) -> list[TensorSpec]:
    """Every tensor of the Mixture of Experts, in the order of the dense tensors that they are made of."""
    found: list[TensorSpec] = []
    dtype, models, width = shared_.dtype, list(shared_.models.values()), shared_.base.config["hidden_size"]
    scales = RouterScales(family, shared_)
    for name, entry in shared_.base.entries.items():
        match = LAYER.fullmatch(name)
        if match and family.attention and match[2] in (QUERY, KEY, VALUE, OUTPUT):
            found += attention_rows(family.attention, experts, shared_, int(match[1]), match[2])
            continue
        if not match or match[2] not in family.expert or int(match[1]) in experts.dense:
            found.append(TensorSpec(name, dtype, shared_.shape(name), partial(shared_.pieces, name)))
            continue
        layer, kind = int(match[1]), match[2]
        prefix = name.removesuffix(kind)
        found += expert_rows(family, experts, models, prefix, kind, entry.shape, dtype)
        if kind == DOWN:
            router = family.router_name(layer)
            make = partial(random_rows, router, experts.count, partial(scales, layer), shared_)
            found.append(TensorSpec(router, dtype, (experts.count, width), make))
            found += _shared_rows(family, experts, prefix, shared_)
            for constant, of in family.constants.items():
                sizes = of.sizes(experts.count, width)
                make = partial(_filled, sizes, dtype, of.value)
                found.append(TensorSpec(prefix + constant, dtype, sizes, make))
            for copy, source in family.copies.items():
                shape, copied = shared_.shape(prefix + source), partial(shared_.pieces, prefix + source)
                found.append(TensorSpec(prefix + copy, dtype, shape, copied))
            if family.input_scale:
                make = partial(_input_scale, shared_, prefix + family.norms[0], width)
                found.append(TensorSpec(prefix + family.input_scale, dtype, (width,), make))
    return found


def _shared_rows(family: Family, experts: Experts, prefix: str, shared_: SharedTensors) -> list[TensorSpec]:
    """A layer's shared expert, where the family has one: its gate is zero, the rest too if the recipe asks for none.

    Several are one block of their widths together, the sum of their outputs divided by their number. Without a gate,
    which would give the half of it, the output projection is halved.
    """
    if family.shared is None:
        return []
    dtype, hidden = shared_.dtype, shared_.base.config["hidden_size"]
    makers: dict[str, Callable[[], Iterable[torch.Tensor]]] = {}
    made_of, cast = experts.settings.shared_experts, partial(_cast, shared_.base, dtype)
    if family.shared.count_field and not made_of:
        return []
    if made_of:
        sources = [shared_.pieces if one == "average" else cast for one in made_of]
        for kind, name in family.shared.names.items():
            some = [partial(source, prefix + kind) for source in sources]
            makers[name] = partial(_one_after_another, some) if kind != DOWN else partial(_beside, some, hidden)
        factor = (1.0 if family.shared.gate else BESIDE_SHARED) / len(made_of)
        if factor != 1.0:
            makers[family.shared.names[DOWN]] = partial(_scaled, makers[family.shared.names[DOWN]], factor)
    idle = IDLE_WIDTH if family.shared.width_field else experts.expert_width
    shapes = family.shared.shapes(hidden, experts.shared_width or idle)
    return [
        TensorSpec(prefix + n, dtype, s, makers.get(n) or partial(_filled, s, dtype, 0.0)) for n, s in shapes.items()
    ]


def _cast(model: Checkpoint, dtype: torch.dtype, name: str) -> Iterator[torch.Tensor]:
    for block in model.blocks(name):
        yield block.to(dtype)


def _input_scale(shared_: SharedTensors, norm: str, width: int) -> list[torch.Tensor]:
    """What makes a router that normalises its input itself see what the experts see."""
    return [(shared_.whole(norm) * width**0.5).to(shared_.dtype)]


def _beside(parts: Sequence[Callable[[], Iterable[torch.Tensor]]], rows: int) -> Iterator[torch.Tensor]:
    """Matrices of `rows` rows with their columns one beside another; blocks as they come where there is one."""
    if len(parts) == 1:
        yield from parts[0]()
        return
    whole = [torch.cat([piece.flatten() for piece in part()]).view(rows, -1) for part in parts]
    yield torch.cat(whole, 1)


def _scaled(make: Callable[[], Iterable[torch.Tensor]], factor: float) -> Iterator[torch.Tensor]:
    for block in make():
        yield block * factor


def _filled(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> list[torch.Tensor]:
    return [torch.full(shape, value, dtype=dtype)]


def attention_rows(
    to: AttentionExperts, experts: Experts, shared_: SharedTensors, layer: int, kind: str
) -> list[TensorSpec]:
    """MoE tensors made of one dense attention tensor: queries and outputs are stacked, keys and values share one."""
    dtype, prefix = shared_.dtype, f"model.layers.{layer}."
    rows, columns = shared_.base.entries[prefix + kind].shape
    name = {QUERY: to.query, OUTPUT: to.output, KEY: to.keys_values}.get(kind)
    if name is None:  # values lie with the keys
        return []
    if kind == KEY:
        both = [partial(shared_.pieces, prefix + one) for one in (KEY, VALUE)]
        return [TensorSpec(prefix + name, dtype, (2 * rows, columns), partial(_one_after_another, both))]
    models = [shared_.models[owner] for owner in experts.owners.values()]
    stacked = partial(_one_after_another, [partial(_cast, model, dtype, prefix + kind) for model in models])
    found = [TensorSpec(prefix + name, dtype, (experts.count, rows, columns), stacked)]
    if kind == OUTPUT:
        hidden, router = shared_.base.config["hidden_size"], prefix + to.router
        make = partial(random_rows, router, experts.count, partial(scale_of, shared_, prefix + to.norm), shared_)
        found.append(TensorSpec(router, dtype, (experts.count, hidden), make))
        found += [TensorSpec(prefix + n, dtype, (hidden,), partial(_filled, (hidden,), dtype, 0.0)) for n in to.zeros]
    return found


def _one_after_another(parts: Iterable[Callable[[], Iterable[torch.Tensor]]]) -> Iterator[torch.Tensor]:
    for part in parts:
        yield from part()
