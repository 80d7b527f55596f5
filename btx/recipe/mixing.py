"""The data mix: the weight of each domain in a training on all of them."""

from __future__ import annotations

from collections.abc import Mapping

from btx.errors import RecipeError
from btx.recipe.recipe import Recipe


def shares_in_all(recipe: Recipe, names: list[str], said: Mapping[str, float], where: str) -> dict[str, float]:
    """Weights of the domains in a training on all that BTX takes: `said`, or those of both stages together."""
    return stated(names, said, where) if said else both_stages(recipe, names)


def both_stages(recipe: Recipe, names: list[str]) -> dict[str, float]:
    """Tokens of each domain that the experts trained here and the finetuning take together."""
    finetuned = mix(recipe, names)
    shares = {n: recipe.finetune.tokens * w / sum(finetuned.values()) for n, w in finetuned.items()}
    for name, domain in recipe.domains.items():
        if name in shares and domain.checkpoint is None:
            shares[name] += float((domain.tokens or 0) * domain.experts)
    return shares


def mix(recipe: Recipe, names: list[str]) -> dict[str, float]:
    """Weights of the domains in the finetuning: finetune.mix, or by default their training tokens."""
    if recipe.finetune.mix:
        return stated(names, recipe.finetune.mix, "finetune.mix")
    budgets = {n: d.tokens and d.tokens * d.experts for n, d in recipe.domains.items()}
    budgets["seed"] = recipe.seed.tokens
    known = [b for n in names if (b := budgets[n])]
    usual = sum(known) / len(known) if known else 1.0
    return {n: float(budgets[n] or usual) for n in names}


def stated(names: list[str], said: Mapping[str, float], where: str) -> dict[str, float]:
    """Stated weights of the domains that have data; RecipeError for a domain without, or if all are zero."""
    for name in said:
        if name not in names:
            raise RecipeError(f"{where} names {name}, which has no `data`. Give it some, or leave it out.")
    weights = {n: float(said.get(n, 0.0)) for n in names}
    if not sum(weights.values()):
        raise RecipeError(f"{where}: all weights are zero. Give at least one domain a positive weight.")
    return weights
