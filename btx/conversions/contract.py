"""The interface of a conversion: a module of this folder whose `CONVERSION` builds its models from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Model, Sources, Start
from btx.recipe.compare_settings import Arm
from btx.recipe.makers import Maker
from btx.recipe.mixing import both_stages
from btx.recipe.recipe import Recipe, Section

EXPERT = "expert:"  # begins the report name of every expert; alone it stands for all of them


def no_training(_recipe: Recipe, _settings: Any, _seed: Config) -> list[Training]:
    """The plan of a conversion that trains nothing."""
    return []


def spends_at_once(section: str) -> Callable[[Recipe, int, Arm], Mapping[str, Any]]:
    """How a conversion with one training spends a budget: all of it there, on its own mix or BTX's in both stages."""

    def spend(recipe: Recipe, tokens: int, _arm: Arm) -> dict[str, Any]:
        if (said := getattr(recipe, section)) and said.mix:
            return {f"{section}.tokens": tokens}
        names = [name for name, domain in recipe.domains.items() if domain.data]
        mix = both_stages(recipe, [*names, "seed"] if recipe.seed.sources else names)
        return {f"{section}.tokens": tokens, f"{section}.mix": {name: w / sum(mix.values()) for name, w in mix.items()}}

    return spend


@dataclass(frozen=True)
class Conversion:
    """One conversion.

    `build` adds steps to the graph and returns the models by their report names, which `models` lists. With a
    `section`, the conversion runs only if the recipe has a key of the module's name, whose settings `build` and `plan`
    get. Without one, it always runs.

    For a comparison, `rates` names its learning rates by stage, and `spend` returns the settings under which it trains
    on that many tokens in all. The last of its models is compared, or the first if `after_merge` is 0, which is the
    share of the tokens that the training with the label `finishing` takes. `on_the_way` names the models between the
    seed and the one that is compared, in order: their scores tell where its gain comes from.

    With a `maker` it can make a domain's expert too (`domains.NAME.expert`).
    """

    build: Callable[[Sources, Start, Experts, Any], dict[str, Model]]
    models: tuple[str, ...]
    section: type[Section] | None = None
    plan: Callable[[Recipe, Any, Config], list[Training]] = no_training
    rates: tuple[str, ...] = ()
    spend: Callable[[Recipe, int, Arm], Mapping[str, Any]] | None = None
    finishing: str = ""
    on_the_way: tuple[str, ...] = ()
    maker: Maker | None = None
