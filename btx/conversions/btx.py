"""Branch-Train-MiX (arXiv 2403.07816): experts merged into one Mixture of Experts, which is finetuned whole."""

from __future__ import annotations

from btx.conversions.experts import Experts
from btx.conversions.sources import Sources, Start
from btx.errors import RecipeError
from btx.recipe.merge_settings import FROM_DATA
from btx.recipe.mixing import mix
from btx.recipe.recipe import Recipe
from btx.steps.finetune import Finetune
from btx.steps.merge import Merge, check_method
from btx.steps.tokens import TokensStep

MERGED = "@merged"  # behind the name of tokens that are in the merged model's tokenizer


def build(sources: Sources, start: Start, experts: Experts) -> tuple[Merge, Finetune | None]:
    """The merged model, and the finetuned one where there is data for it."""
    recipe = sources.recipe
    tokens = mixed(sources, start, experts)
    known = router_data(recipe, tokens)
    others = {expert: name for expert, name in recipe.domain_of.items() if known and expert != name}
    merge = sources.add(
        Merge(tokens=known, domains=others, settings=recipe.merge, **experts.fields(start), **sources.place())
    )
    check_method(recipe.merge, list(merge.models))
    if not start.tokens:
        return merge, None  # experts that were trained elsewhere can be merged, no more
    weights = mix(recipe, list(tokens))
    return merge, sources.add(
        Finetune(merge=merge, tokens=tokens, weights=weights, settings=recipe.finetuning, **sources.place())
    )


def mixed(sources: Sources, start: Start, experts: Experts) -> dict[str, TokensStep]:
    """All data in the tokenizer of the merged model."""
    return sources.all_data(start, experts.vocabulary, MERGED) if experts.vocabulary else sources.all_data(start)


def own_tokens(sources: Sources, start: Start, experts: Experts) -> dict[str, dict[str, TokensStep]]:
    """By the name of a model whose tokenizer is another than the seed's, the domains in that tokenizer."""
    if experts.vocabulary is None:
        return {}
    merged = mixed(sources, start, experts)
    own = {
        f"expert:{name}": {
            n: sources.tokens(n, *start.documents[n], experts.steps[name], f"@{name}", start.seed) for n in start.tokens
        }
        for name in experts.vocabulary.experts
    }
    return own | {model: {n: merged[n] for n in start.tokens} for model in ("average", "merged", "finetuned")}


def router_data(recipe: Recipe, tokens: dict[str, TokensStep]) -> dict[str, TokensStep]:
    """The tokens that a router is made from, by model; none for one that needs no data."""
    if recipe.merge.router not in FROM_DATA:
        return {}
    owners = {*recipe.domains, *recipe.models}
    known = {name: step for name, step in tokens.items() if name in owners}
    if len(known) < 2:
        raise RecipeError(
            f"merge.router: {recipe.merge.router} needs `data` of two domains or more, here are "
            f"{', '.join(known) or 'none'}. Give the domains some, or use random."
        )
    return known
