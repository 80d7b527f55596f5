"""How the feed-forward blocks of several models are laid out as experts of one Mixture of Experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from btx.checkpoints.reader import BLOCK, Checkpoint
from btx.checkpoints.validate import MOST_LAYERS
from btx.errors import RecipeError
from btx.merge.renewed import chosen, renewed
from btx.models.families import DENSE, MOE, family_of
from btx.models.family import DOWN, IDLE_WIDTH, LAYER, Family
from btx.models.mixture import expert_blocks
from btx.models.own_experts import OwnExperts, own_experts, side_by_side
from btx.models.target import moe_config
from btx.recipe.merge_settings import MergeSettings

BESIDE_SHARED = 0.5  # scale of routed experts beside a shared one, whose fresh gate sigmoid(0) gives the other half: so
# N copies and a shared expert of the same block give that block; halving is exact but for subnormals


@dataclass(frozen=True)
class Experts:
    """How the models' feed-forward blocks are laid out as MoE experts: one or more each, split into chunks, or blended.

    split (paper, section on expert splitting): each block is cut into `chunks` of width F/C; the output projection is
    multiplied by C so that equal routing weights over all N·C chunks give the mean of the models' outputs.
    blend: the n-th expert joins the n-th chunk (of N) of every model; equal routing weights over all N experts already
    give the mean of the models' outputs (the factor is 1).
    Of models that are mixtures, all experts stand side by side, those of one model together (`OwnExperts`).
    """

    settings: MergeSettings
    models: tuple[str, ...]
    hidden: int  # width of the models
    width: int  # of their feed-forward blocks, or of an expert of a mixture
    layers: tuple[int, ...]  # layers with experts
    dense: tuple[int, ...]  # layers without
    own: OwnExperts | None = None  # of models that are mixtures

    @property
    def branches(self) -> dict[str, str]:
        """What a recipe counts as one expert: names, with the model each is made of; of a mixture all of its own."""
        return self.settings.owners(self.models)

    @property
    def each(self) -> int:
        """The experts of a branch."""
        return self.own.count if self.own else 1

    @property
    def visited(self) -> int:
        """The experts that a token visits for each that a recipe's top_k counts."""
        return self.own.visited if self.own else 1

    def per_token(self, top_k: int) -> int:
        """So many branches' worth of experts as `top_k` says, as far as there are; all where weights need all."""
        most = len(self.branches)
        return most if self.own and not self.own.normalised else min(top_k, most)

    @property
    def owners(self) -> dict[str, str]:
        """The name of every MoE expert, in order, with the model it is made of (empty for a blended one)."""
        if self.each == 1:
            return self.branches
        return {f"{name}.{e}": model for name, model in self.branches.items() for e in range(self.each)}

    @property
    def count(self) -> int:
        """Number of MoE experts."""
        return len(self.owners)

    def routers(self, family: Family) -> list[str]:
        """The names on disk of all routers, in the order of the model's modules."""
        found = []
        for layer in self.layers:
            found.append(family.router_name(layer))
            if family.attention:
                found.append(f"model.layers.{layer}.{family.attention.router}")
        return found

    @property
    def parts(self) -> int:
        """Number of chunks per model's feed-forward block."""
        return {"split": self.settings.chunks, "blend": len(self.models)}.get(self.settings.experts, 1)

    @property
    def expert_width(self) -> int:
        """Feed-forward width of one MoE expert."""
        return self.width // self.parts if self.settings.experts == "split" else self.width

    @property
    def shared_width(self) -> int | None:
        """Feed-forward width of all shared experts together; None where the recipe asks for none."""
        return len(self.settings.shared_experts) * self.width or None

    @property
    def scale(self) -> float:
        """Factor on the experts' output projections."""
        chunks = self.parts if self.settings.experts == "split" else 1
        return chunks * (BESIDE_SHARED if self.shared_width else 1.0)

    def config(self, seed: Mapping[str, Any], top_k: int | None, where: str) -> Any:
        """The native MoE config made from a seed's; a token visits `top_k` branches' worth of experts, or all."""
        visited = top_k or len(self.branches)
        if self.own:
            return side_by_side(dict(seed), where, models=len(self.branches), top_k=visited)
        return moe_config(
            dict(seed), experts=self.count, top_k=visited, width=self.expert_width, where=where,
            dense_layers=self.dense, shared_width=self.shared_width or IDLE_WIDTH,
            shared=len(self.settings.shared_experts), attention=self.settings.attention,
        )  # fmt: skip

    def sources(self, expert: int) -> list[tuple[int, int]]:
        """What MoE expert `expert` is made of: (model, chunk) pairs, in the order of its rows."""
        if self.settings.experts == "blend":
            return [(model, expert) for model in range(len(self.models))]
        owners = list(self.owners.values())
        chunk = owners[:expert].count(owners[expert]) if self.settings.experts == "split" else 0
        return [(self.models.index(owners[expert]), chunk)]

    def pieces(self, models: list[Checkpoint], expert: int, name: str) -> Iterator[torch.Tensor]:
        """The feed-forward tensor `name` of MoE expert `expert`, as blocks in row-major order."""
        made = partial(self._made, models, expert, name)
        if self.settings.reinitialize:
            key = f"{self.settings.seed}/{list(self.owners)[expert]}"
            layer = LAYER.fullmatch(name)
            units = chosen(self.width, self.settings.reinitialize, f"{key}/{layer[1] if layer else name}")
            columns = self.width if name.endswith(DOWN) else self.hidden
            made = partial(renewed, made, columns, units, down=name.endswith(DOWN), key=f"{key}/{name}")
        for piece in made():
            yield piece.to(torch.float32) * self.scale if self.scale != 1.0 and name.endswith(DOWN) else piece

    def _made(self, models: list[Checkpoint], expert: int, name: str) -> Iterator[torch.Tensor]:
        if self.own:
            owner = list(self.branches.values())[expert // self.each]
            found = models[self.models.index(owner)]
            yield from expert_blocks(found, MOE[found.config["model_type"]], name, expert % self.each, self.each)
            return
        rows, columns = models[0].entries[name].shape
        if name.endswith(DOWN) and self.parts > 1:
            yield from self._columns(models, expert, name)
            return
        size = rows // self.parts * columns if not name.endswith(DOWN) else rows * columns
        for model, chunk in self.sources(expert):
            yield from models[model].blocks(name, chunk * size, (chunk + 1) * size)

    def _columns(self, models: list[Checkpoint], expert: int, name: str) -> Iterator[torch.Tensor]:
        rows, columns = models[0].entries[name].shape
        width, step = columns // self.parts, max(1, BLOCK // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            cut = [
                models[m].flat(name, start * columns, stop * columns).view(-1, columns)[:, c * width : (c + 1) * width]
                for m, c in self.sources(expert)
            ]
            yield torch.cat(cut, 1)


def layout(settings: MergeSettings, models: Sequence[str], config: Mapping[str, Any], where: str) -> Experts:
    """The recipe's expert layout over models by name, for a seed's config; RecipeError for an impossible one."""
    family = family_of(dict(config), where, attention=settings.attention)
    if own := own_experts(dict(config), where):
        return _of_mixtures(settings, models, config, own, family)
    if settings.router == "own":
        raise RecipeError(
            f"merge.router: own leaves a mixture its own routers, and {where} is dense. Use auto, or leave it out."
        )
    width = config["intermediate_size"]
    layers = sparse_layers(settings, config["num_hidden_layers"], family)
    if settings.shared_experts and not family.shared:
        can = _names(f.dense for f in DENSE.values() if f.shared)
        raise RecipeError(
            f"merge.shared_expert: {settings.shared_expert} needs an MoE class with a shared expert, but {where} "
            f"({family.dense}) becomes {family.moe}, which has none. Leave it out, or use a seed of the family {can}."
        )
    dense = tuple(sorted({*range(config["num_hidden_layers"])} - {*layers}))
    made = Experts(settings, tuple(models), config["hidden_size"], width, layers, dense)
    if width % made.parts:
        raise RecipeError(
            f"merge.experts: {settings.experts} cuts the feed-forward width {width} into {made.parts} chunks, "
            "which does not divide evenly. Choose another number of chunks (under blend: of models)."
        )
    if made.shared_width and family.shared and not family.shared.width_field:
        if made.expert_width != width:
            raise RecipeError(
                f"merge.shared_expert: {settings.shared_expert} is {width} wide and experts under merge.experts: split "
                f"{made.expert_width}, but {family.moe} has one width for both. Leave one of the two out."
            )
        if len(settings.shared_experts) > 1 and not family.shared.count_field:
            raise RecipeError(
                f"merge.shared_expert: {settings.shared_expert} are several, and {family.moe} has one, as wide as a "
                "routed expert. Name one."
            )
    return made


def _of_mixtures(
    settings: MergeSettings, models: Sequence[str], config: Mapping[str, Any], own: OwnExperts, family: Family
) -> Experts:
    """The layout of models that are mixtures; RecipeError for what is done to dense feed-forward blocks alone."""
    asked = {
        "experts": settings.experts != "per_model" and settings.experts,
        "layers": settings.layers != "all" and settings.layers,
        "shared_expert": bool(settings.shared_experts) and settings.shared_expert,
        "router": settings.router == "arrow" and settings.router,
    }
    if unfit := [f"{key}: {value}" for key, value in asked.items() if value]:
        raise RecipeError(
            f"merge.{unfit[0]} applies to dense feed-forward blocks, and the seed is a mixture ({family.moe}), whose "
            "experts are kept as they are. Leave it out."
        )
    dense = tuple(sorted({*range(config["num_hidden_layers"])} - {*own.layers}))
    return Experts(settings, tuple(models), config["hidden_size"], own.width, own.layers, dense, own)


def sparse_layers(settings: MergeSettings, count: int, family: Family) -> tuple[int, ...]:
    """The layers that get experts, in order; RecipeError for layers that do not exist, or must not be left out."""
    if count > MOST_LAYERS:
        raise RecipeError(f"the seed's num_hidden_layers is {count}, more than a model has. Correct its config.json.")
    if settings.layers == "all":
        return tuple(range(count))
    asked = range(1, count, 2) if settings.layers == "alternate" else settings.layers
    found = tuple(sorted({*asked}))
    if not found or found[-1] >= count:
        raise RecipeError(f"merge.layers: the seed has the layers 0 to {count - 1}. Choose some of them.")
    if len(found) < count and not family.dense_layers:
        can = _names(f.dense for f in DENSE.values() if f.dense_layers)
        raise RecipeError(
            f"merge.layers leaves some layers without experts, but a {family.dense} becomes {family.moe}, which has "
            f"them in every layer. Leave it out, or use a seed of the family {can}."
        )
    return found


def _names(families: Iterator[str]) -> str:
    return " or ".join(families)
