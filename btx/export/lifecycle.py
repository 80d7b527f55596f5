"""Changes a Mixture of Experts after the merge: removes, adds, replaces or masks experts.

Folders are read and written block by block, as in the merge. Everything else stays bit for bit the same: the shared
tensors, the other experts, and their rows of every router.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.writer import TensorSpec, write_weights
from btx.errors import ArtifactError, RecipeError
from btx.export.masked import Masked
from btx.graph.artifact import write_json
from btx.merge.layout import BESIDE_SHARED
from btx.models.families import mixture_family
from btx.models.family import DOWN, LAYER, Constant
from btx.models.mixture import EXPERTS, Moe, Source, patterns
from btx.models.native import config_difference
from btx.models.target import moe_config

OF_LAYERS = (  # config fields that say which layers have experts
    "decoder_sparse_step", "mlp_layer_types", "mlp_only_layers", "moe_layer_end_index", "moe_layer_interval",
    "moe_layer_start_index", "num_dense_layers",
)  # fmt: skip


def from_dense(dense: Checkpoint, moe: Moe, name: str) -> Source:
    """A dense model's feed-forward blocks as an expert; ArtifactError when they do not fit.

    Beside a shared expert that is not zero, its output is halved, as in the merge.
    """
    for layer in moe.layers:
        for kind in moe.family.expert:
            entry = dense.entries.get(f"model.layers.{layer}.{kind}")
            if entry is None or entry.shape != moe.shape(kind):
                seen = "missing" if entry is None else "x".join(map(str, entry.shape))
                raise ArtifactError(
                    f"the expert {name} ({dense.folder}): model.layers.{layer}.{kind} is {seen}, the experts of "
                    f"{moe.checkpoint.folder} are {'x'.join(map(str, moe.shape(kind)))}. Use a model trained from the "
                    "same seed."
                )
    halved = any(bool(block.any()) for name in _shared_outputs(moe) for block in moe.checkpoint.blocks(name))

    def source(prefix: str, kind: str) -> Iterator[torch.Tensor]:
        for block in dense.blocks(prefix + kind):
            yield block * BESIDE_SHARED if halved and kind == DOWN else block

    return source


def _shared_outputs(moe: Moe) -> list[str]:
    """The output projections of the shared experts, where the family has them."""
    shared = moe.family.shared
    names = [f"model.layers.{layer}.{shared.names[DOWN]}" for layer in moe.layers] if shared else []
    return [name for name in names if name in moe.checkpoint.entries]


def write_changed(
    out: Path, moe: Moe, experts: Mapping[str, int | Source], routers: Callable[[int], torch.Tensor],
    top_k: int | None = None, back: Masked | None = None,
) -> None:  # fmt: skip
    """Write the folder with these experts: by name, the number of an old one or the source of a new one.

    `routers(layer)` gives the router (number of experts, D); `back` holds what else new experts bring along. Old
    experts keep the order of their tensors in the file.
    """
    count = len(experts)
    if count < 1:
        raise RecipeError(
            f"{moe.checkpoint.folder} would have no expert left. Use `btx moe extract` for a dense model."
        )
    sources = [moe.expert(e) if isinstance(e, int) else e for e in experts.values()]
    origin = [e if isinstance(e, int) else None for e in experts.values()]
    write_weights(out, list(_rows(moe, sources, origin, routers, back)))
    chosen = min(top_k or int(moe.config[moe.family.top_k_field]), count)
    write_json(out / "config.json", {**moe.config, moe.count_field: count, moe.family.top_k_field: chosen})
    write_json(out / EXPERTS, {"experts": list(experts)})


def _rows(
    moe: Moe, sources: Sequence[Source], origin: Sequence[int | None], routers: Callable[[int], torch.Tensor],
    back: Masked | None,
) -> Iterator[TensorSpec]:  # fmt: skip
    kinds = patterns(moe.family)
    for name, entry in moe.checkpoint.entries.items():
        dtype = moe.checkpoint.flat(name, 0, 0).dtype
        match = LAYER.fullmatch(name)
        prefix, rest = (name.removesuffix(match[2]), match[2]) if match else ("", name)
        kind, number = next(((k, m) for k, p in kinds.items() if (m := p.fullmatch(rest))), (None, None))
        if match and rest == moe.family.router:
            layer = int(match[1])
            shape = (len(sources), entry.shape[1])
            yield TensorSpec(name, dtype, shape, partial(_router, routers, layer, dtype))
        elif rest in moe.of_experts:
            of = moe.of_experts[rest]
            sizes = of.sizes(len(sources), moe.hidden)
            yield TensorSpec(name, dtype, sizes, partial(_of_experts, moe, name, of, origin, back))
        elif kind is None or number is None:
            yield TensorSpec(name, dtype, entry.shape, partial(moe.checkpoint.blocks, name))
        elif moe.family.stacked:
            together = [k for k in moe.family.expert if moe.family.expert[k] == moe.family.expert[kind]]
            yield TensorSpec(name, dtype, (len(sources), *entry.shape[1:]),
                      partial(cast_blocks, [(s, k) for s in sources for k in together], prefix, dtype))  # fmt: skip
        else:
            for place in _places(origin, int(number["e"]), moe.count):
                published = prefix + moe.family.expert[kind].format(e=place)
                yield TensorSpec(
                    published, dtype, entry.shape, partial(cast_blocks, [(sources[place], kind)], prefix, dtype)
                )


def _places(origin: Sequence[int | None], old: int, count: int) -> list[int]:
    """Places of the expert that was number `old`, if it stays; the new experts' follow the last old one."""
    places = [place for place, e in enumerate(origin) if e == old]
    if old == count - 1:
        places += [place for place, e in enumerate(origin) if e is None]
    return places


def cast_blocks(
    sources: list[tuple[Source, str]], prefix: str, dtype: torch.dtype, factor: float = 1.0
) -> Iterator[torch.Tensor]:
    """Tensors of experts one after another, times a factor, in blocks of a dtype."""
    for source, kind in sources:
        for block in source(prefix, kind):
            yield (block if factor == 1.0 else block.to(torch.float32) * factor).to(dtype)


def _of_experts(
    moe: Moe, name: str, of: Constant, origin: Sequence[int | None], back: Masked | None
) -> list[torch.Tensor]:
    """A tensor with an entry for every expert: old experts keep theirs, new ones bring theirs or get its constant."""
    axis, old = of.shape.index("E"), moe.checkpoint.read(name)
    made = torch.full(of.sizes(len(origin), moe.hidden), of.value, dtype=old.dtype).movedim(axis, 0)
    places = [place for place, e in enumerate(origin) if e is not None]
    made[places] = old.movedim(axis, 0)[[e for e in origin if e is not None]]
    if back:
        made[back.places] = back.checkpoint.read(name).to(old.dtype).movedim(axis, 0)
    return [made.movedim(0, axis).contiguous()]


def _router(routers: Callable[[int], torch.Tensor], layer: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [routers(layer).to(dtype)]


def remove(out: Path, moe: Moe, names: Sequence[str]) -> None:
    """Write the folder without some experts and their rows of the routers."""
    gone = {*moe.numbers(names)}
    kept = [e for e in range(moe.count) if e not in gone]
    write_changed(out, moe, {moe.names[e]: e for e in kept}, lambda layer: moe.router(layer)[kept])


def replace(out: Path, moe: Moe, name: str, source: Source) -> None:
    """Write the folder with another model's feed-forward blocks in place of an expert, whose router rows stay."""
    number = moe.index(name)
    experts: dict[str, int | Source] = {n: e for e, n in enumerate(moe.names)}
    experts[moe.names[number]] = source
    write_changed(out, moe, experts, moe.router)


def require_new(moe: Moe, name: str) -> None:
    """RecipeError for a name that an expert already has, or that could be taken for a number or a path."""
    if name in moe.names:
        raise RecipeError(
            f"{moe.checkpoint.folder} already has an expert {name!r}. Use `btx moe replace`, or another name."
        )
    if name.isdecimal() or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise RecipeError(f"--name {name!r} is not an expert's name: use letters, digits, '-', '_', '.'; no number.")


def add(out: Path, moe: Moe, name: str, source: Source, rows: Callable[[int], torch.Tensor]) -> None:
    """Write the folder with one more expert, the last; `rows(layer)` gives its row (D,) of each router."""
    require_new(moe, name)
    experts: dict[str, int | Source] = {n: e for e, n in enumerate(moe.names)}
    write_changed(out, moe, {**experts, name: source}, lambda layer: with_row(moe.router(layer), rows(layer)))


def with_row(router: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """A router (E, D) with one more row (D,), in its own dtype."""
    return torch.cat([router, row[None].to(router.dtype)])


def keep(out: Path, moe: Moe, names: Sequence[str]) -> None:
    """Write experts whole, with their router rows and their places, so that `unmask` can put them back."""
    out.mkdir()
    places = moe.numbers(names)
    rows: list[TensorSpec] = []
    for layer in moe.layers:
        prefix = f"model.layers.{layer}."
        for e, k in product(places, moe.family.expert):
            dtype = moe.dtype(e, prefix, k)
            rows.append(
                TensorSpec(
                    f"{prefix}{e}.{k}", dtype, moe.shape(k), partial(cast_blocks, [(moe.expert(e), k)], prefix, dtype)
                )
            )
        router = moe.router(layer)[places]
        rows.append(
            TensorSpec(moe.family.router_name(layer), router.dtype, tuple(router.shape), partial(list, [router]))
        )
        for rest, of in moe.of_experts.items():
            entries = moe.checkpoint.read(prefix + rest).movedim(axis := of.shape.index("E"), 0)[places]
            own = entries.movedim(0, axis).contiguous()
            rows.append(TensorSpec(prefix + rest, own.dtype, tuple(own.shape), partial(list, [own])))
    write_weights(out, rows)
    kept = {"places": places, "names": [moe.names[e] for e in places], "top_k": moe.config[moe.family.top_k_field]}
    write_json(out / "config.json", {"model_type": moe.config["model_type"], **kept})


def unmask(out: Path, moe: Moe, away: Masked) -> None:
    """Write the mixture with kept experts back in their places, router rows too."""
    places, total = away.places, moe.count + len(away.places)
    stay = [e for e in range(total) if e not in places]
    experts: dict[str, int | Source] = {}
    for place in range(total):
        if place in stay:
            experts[moe.names[stay.index(place)]] = stay.index(place)
        else:
            experts[away.names[places.index(place)]] = partial(away.pieces, place)

    def routers(layer: int) -> torch.Tensor:
        now = moe.router(layer)
        whole = now.new_empty(total, now.shape[1])
        whole[stay], whole[places] = now, away.checkpoint.read(moe.family.router_name(layer)).to(now.dtype)
        return whole

    write_changed(out, moe, experts, routers, top_k=away.top_k, back=away)


def config_of_pair(dense: Checkpoint, moe: Moe, where: str) -> list[str]:
    """The deciding config fields in which a mixture made of this dense model would differ from this mixture.

    Those that say which layers have experts do not count: the mixture's are known. ArtifactError for a mixture.
    """
    if mixture_family(dense.config):
        raise ArtifactError(
            f"{where} is a mixture itself ({dense.config['model_type']}), and one expert is a dense model. Extract one "
            "of its experts (btx moe extract), or merge mixtures by a recipe."
        )
    made = moe_config(dense.config, experts=moe.count, top_k=1, width=moe.width, where=where, dense_layers=moe.dense)
    found = config_difference(
        moe.config, made.to_dict(), where, carried=moe.family.carried, names=("the mixture", "it")
    )
    return [one for one in found if one.split(":")[0] not in OF_LAYERS]
