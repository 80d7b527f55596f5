"""The merge: feed-forward blocks become experts, every other tensor is averaged; block by block.

Open checkpoints are read so that one block of each is in memory at a time, whatever their size (one whole tensor of
each where the averaging method is not elementwise). Sums are taken in fp32 in the order of the models and cast once:
averaging in bf16 rounds a quarter of the weights wrongly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

from btx.checkpoints.names import EMBEDDING
from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.writer import Meter, Resume, TensorSpec, write_weights
from btx.errors import ArtifactError, RecipeError
from btx.merge.averaging import SharedTensors
from btx.merge.canonical import joined
from btx.merge.layout import BESIDE_SHARED, Experts, layout
from btx.merge.vocabulary import JointVocabulary
from btx.models.families import DENSE, family_of
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
    rows = joined(DENSE[base.config["model_type"]], rows)
    return write_weights(out, rows, resume=resume, progress=progress)


def write_moe(
    out: Path, models: Mapping[str, Checkpoint], base: Checkpoint, settings: MergeSettings, top_k: int,
    resume: Resume | None = None, progress: Meter | None = None, joint: JointVocabulary | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write the merged Mixture of Experts (config and weights, published names) into `out`; returns files' SHA-256.

    `models` by name, in expert order; `base` is the seed, whether or not it is among them; both are trimmed by `joint`
    if some models added tokens.
    """
    family = family_of(base.config, str(base.folder), attention=settings.attention)
    experts = layout(settings, list(models), base.config, str(base.folder))
    if not 1 <= top_k <= experts.count:
        raise RecipeError(
            f"finetune.top_k is {top_k}, but the merge makes {experts.count} experts. Choose 1 to {experts.count}."
        )
    config = experts.config(base.config, top_k, str(base.folder))
    shared_ = SharedTensors(models, base, settings, joint)
    config.dtype = shared_.dtype
    config.architectures = [class_name(config)]
    digests = write_weights(out, moe_rows(family, experts, shared_), resume=resume, progress=progress)
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
        found += _expert_rows(family, experts, models, prefix, kind, entry.shape, dtype)
        if kind == DOWN:
            router = family.router_name(layer)
            make = partial(_router, router, experts.count, partial(scales, layer), shared_)
            found.append(TensorSpec(router, dtype, (experts.count, width), make))
            found += _shared_rows(family, experts, prefix, shared_)
            for constant, of in family.constants.items():
                if of.switch:
                    continue  # the config leaves it out
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


def _expert_rows(
    family: Family, experts: Experts, models: list[Checkpoint], prefix: str, kind: str, shape: tuple[int, ...],
    dtype: torch.dtype,
) -> list[TensorSpec]:  # fmt: skip
    """MoE tensors made of one dense feed-forward tensor: one per expert, or one for all experts of a layer."""
    axis = 1 if kind == DOWN else 0
    one = tuple(experts.expert_width if a == axis else s for a, s in enumerate(shape))
    published = family.expert[kind]

    def pieces(numbers: Iterable[int], kinds: Iterable[str]) -> Iterator[torch.Tensor]:
        for e, k in product(numbers, kinds):
            for piece in experts.pieces(models, e, prefix + k):
                yield piece.to(dtype)

    if not family.stacked:
        return [
            TensorSpec(prefix + published.format(e=e), dtype, one, partial(pieces, [e], [kind]))
            for e in range(experts.count)
        ]
    together = [k for k in family.expert if family.expert[k] == published]  # gate and up lie in one tensor
    if kind != together[0]:
        return []
    stacked = (experts.count, len(together) * one[0], one[1])
    return [TensorSpec(prefix + published, dtype, stacked, partial(pieces, range(experts.count), together))]


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
        make = partial(_router, router, experts.count, partial(_scale, shared_, prefix + to.norm), shared_)
        found.append(TensorSpec(router, dtype, (experts.count, hidden), make))
        found += [TensorSpec(prefix + n, dtype, (hidden,), partial(_filled, (hidden,), dtype, 0.0)) for n in to.zeros]
    return found


def _one_after_another(parts: Iterable[Callable[[], Iterable[torch.Tensor]]]) -> Iterator[torch.Tensor]:
    for part in parts:
        yield from part()


def _router(name: str, count: int, scale: Callable[[], torch.Tensor], shared_: SharedTensors) -> list[torch.Tensor]:
    """Router weights, a row per expert, scaled to the router's inputs and drawn from a seed of the layer's own."""
    from btx.moe.routing import init_router

    key = int.from_bytes(hashlib.sha256(f"{shared_.settings.seed}/{name}".encode()).digest()[:7])
    generator = torch.Generator().manual_seed(key)
    made = init_router(
        scale(), experts=count, entropy=shared_.settings.random_entropy, generator=generator,
        orthogonal=shared_.settings.router == "orthogonal",
    )  # fmt: skip
    return [made.to(shared_.dtype)]


def _scale(shared_: SharedTensors, norm: str, offset: float = 0.0) -> torch.Tensor:
    scale = shared_.whole(norm) + offset
    if not scale.any():
        raise ArtifactError(
            f"{norm} is all {0 - offset:g} in the merged model, so its router would see nothing but zeros. "
            f"Use other weights for it than those of {shared_.base.folder}."
        )
    return scale


class RouterScales:
    """The RMS (D,) of each component of a layer's router input, estimated from the merged weights alone.

    After an RMS norm it is the norm's weight, with what its class adds to that. Where the router sees the bare residual
    stream (FlexOlmo), the input is the sum of the embedding and of normed outputs, two per layer up to the router's
    own: their mean squares add up, as far as they are uncorrelated.
    """

    def __init__(self, family: Family, shared_: SharedTensors) -> None:
        self.family, self.shared = family, shared_
        self._embedding: torch.Tensor | None = None

    def __call__(self, layer: int) -> torch.Tensor:
        """The RMS for one layer; ArtifactError when its norm's weight is all zeros."""
        names = [f"model.layers.{n}.{norm}" for n in range(layer + 1) for norm in self.family.norms]
        if self.family.residual:
            added = [self.shared.whole(name).square() for name in names[:-1]]  # the last is added after the router
            return torch.stack([self._embedding_square(), *added]).sum(0).sqrt()
        return _scale(self.shared, names[-1], self.family.norm_offset)

    def _embedding_square(self) -> torch.Tensor:
        if self._embedding is None:
            rows, width = self.shared.shape(EMBEDDING)
            total, rest = torch.zeros(width), torch.empty(0)
            for piece in self.shared.pieces(EMBEDDING):
                rest = torch.cat([rest, piece.flatten().to(torch.float32)])
                full = len(rest) // width * width
                total += rest[:full].view(-1, width).square().sum(0)
                rest = rest[full:]
            self._embedding = total / rows
        return self._embedding
