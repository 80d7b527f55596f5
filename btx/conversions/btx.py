"""Branch-Train-MiX (arXiv 2403.07816): experts merged into one Mixture of Experts, which is finetuned whole."""

from __future__ import annotations

from typing import Any

from btx.conversions.contract import EXPERT, Conversion
from btx.conversions.experts import Experts
from btx.conversions.experts import plan as experts_plan
from btx.conversions.experts import spend as of_experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Model, Sources, Start
from btx.errors import RecipeError
from btx.merge.layout import layout
from btx.recipe.compare_settings import Arm
from btx.recipe.merge_settings import FROM_DATA
from btx.recipe.mixing import mix
from btx.recipe.recipe import Recipe
from btx.steps.finetune import Finetune
from btx.steps.merge import Merge, check_method
from btx.steps.tokens import TokensStep


def build(sources: Sources, start: Start, experts: Experts, _settings: None) -> dict[str, Model]:
    """The merged model, and the finetuned one where there is data for it."""
    recipe = sources.recipe
    tokens = experts.data_merged(sources, start)
    known = router_data(recipe, tokens)
    others = {expert: name for expert, name in recipe.domain_of.items() if known and expert != name}
    merge = sources.add(
        Merge(tokens=known, domains=others, settings=recipe.merge, **experts.fields(start), **sources.place())
    )
    check_method(recipe.merge, list(merge.models))
    settings, own = recipe.finetuning, experts.domains_merged(sources, start)
    models = {"merged": Model(merge, settings.rule, own)}
    if start.tokens:  # without data, experts trained elsewhere can only be merged
        finetune = sources.add(
            Finetune(merge=merge, tokens=tokens, weights=mix(recipe, list(tokens)), settings=settings.plain,
                     moments=settings.moments == "experts", adapter=settings.adapter, **sources.place())
        )  # fmt: skip
        models["finetuned"] = Model(finetune, settings.rule, own, exported=True, before="merged")
    return models


def router_data(recipe: Recipe, tokens: dict[str, TokensStep]) -> dict[str, TokensStep]:
    """The tokens that initialise the router, by model; empty for a router that needs no data."""
    if recipe.merge.router not in FROM_DATA:
        return {}
    owners = {*recipe.domains, *recipe.models}
    known = {name: step for name, step in tokens.items() if name in owners}
    if len(known) < 2:
        raise RecipeError(
            f"merge.router: {recipe.merge.router} needs `data` in two domains or more, found: "
            f"{', '.join(known) or 'none'}. Give the domains data, or use random."
        )
    return known


def spend(recipe: Recipe, tokens: int, arm: Arm) -> dict[str, Any]:
    """The share after the merge for the finetuning, the rest for the experts."""
    after = recipe.finetune.tokens / recipe.tokens_in_all if arm.after_merge is None else arm.after_merge
    if after == 1:
        raise RecipeError(
            "compare: after_merge is 1, so nothing is left for the experts. Use `upcycle`, or choose less."
        )
    finetune = {"finetune.tokens": round(tokens * after)} if after else {}
    return {**of_experts(recipe, round(tokens * (1 - after))), **finetune}


def plan(recipe: Recipe, settings: None, seed: Config) -> list[Training]:
    """The experts, and the finetuning of what is merged of them."""
    merged = layout(recipe.merge, recipe.models, seed, "the seed")
    config = merged.config(seed, recipe.finetune.experts_per_token, "the seed").to_dict()
    return [
        *experts_plan(recipe, settings, seed),
        Training("finetune", config, recipe.finetune.tokens, recipe.finetuning),
    ]


CONVERSION = Conversion(
    build,
    models=("merged", "finetuned"),
    plan=plan,
    rates=("train.learning_rate", "finetune.learning_rate"),
    spend=spend,
    finishing="finetune",
    on_the_way=(EXPERT, "average", "merged"),
)
