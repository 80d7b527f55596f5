"""The dense experts of each domain: the seed trained on it, or checkpoints trained elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from btx.conversions.planned import Config, Training
from btx.conversions.sources import Branch, Model, Sources, Start
from btx.errors import told_at
from btx.recipe.compare_settings import Arm
from btx.recipe.makers import Maker
from btx.recipe.recipe import Recipe
from btx.recipe.settings import ExpertSettings
from btx.steps.branch import VerifyExperts
from btx.steps.given import ExternalCheckpoint
from btx.steps.model import ModelStep
from btx.steps.tokens import TokensStep
from btx.steps.train import Train
from btx.steps.vocabulary import VocabularyStep

MERGED = "@merged"  # suffix of the tokens of the merged model's tokenizer


@dataclass(frozen=True)
class Experts:
    """The experts by name, in the recipe's order, and the lineage check of those trained elsewhere."""

    steps: dict[str, ModelStep]
    descent: VerifyExperts | None
    vocabulary: VocabularyStep | None  # if some have added tokens

    def fields(self, start: Start) -> dict[str, Any]:
        """The fields that a step which merges them has."""
        return {"branch": start.branch, "descent": self.descent, "experts": self.steps, "vocabulary": self.vocabulary}

    def models(self, sources: Sources, start: Start) -> dict[str, Model]:
        """The experts as models to be measured."""
        own = {
            name: {n: sources.tokens(n, *start.documents[n], self.steps[name], f"@{name}", start.seed)
                   for n in start.tokens}
            for name in (self.vocabulary.experts if self.vocabulary else ())
        }  # fmt: skip
        return {f"expert:{name}": Model(step, tokens=own.get(name, {})) for name, step in self.steps.items()}

    def data_merged(self, sources: Sources, start: Start) -> dict[str, TokensStep]:
        """All data, tokenised for the merged model."""
        return sources.all_data(start, self.vocabulary, MERGED) if self.vocabulary else sources.all_data(start)

    def domains_merged(self, sources: Sources, start: Start) -> dict[str, TokensStep]:
        """The domains tokenised for the merged model; empty if that has the seed's tokenizer."""
        return {n: self.data_merged(sources, start)[n] for n in start.tokens} if self.vocabulary else {}


def spend(recipe: Recipe, tokens: int, _arm: Arm | None = None) -> dict[str, Any]:
    """Settings under which the experts take so many tokens in all, shared out as the recipe's are."""
    whole = sum((domain.tokens or 0) * domain.experts for domain in recipe.domains.values())
    return {
        f"domains.{name}.tokens": max(1, round(tokens * (domain.tokens or 0) / whole))
        for name, domain in recipe.domains.items()
    }


def plan(recipe: Recipe, _settings: None, seed: Config) -> list[Training]:
    """The trainings of the experts."""
    found = []
    for domain, said in recipe.domains.items():
        if said.tokens and said.checkpoint is None:
            how, settings = recipe.making(domain)
            found += [recipe.makers[how].plan(settings, seed, name, said.tokens) for name in said.names(domain)]
    return found


def trained(sources: Sources, start: Start, branch: Branch, settings: ExpertSettings) -> Train:
    """The seed, trained on the domain."""
    return sources.add(Train(
        branch=start.branch, tokens=branch.text, budget=branch.tokens, train=settings, part=branch.part,
        moments=sources.recipe.finetune.moments == "experts", **sources.place(branch.name),
    ))  # fmt: skip


def trained_plan(settings: ExpertSettings, seed: Config, name: str, tokens: int) -> Training:
    """A training of the seed's shape."""
    return Training(f"train:{name}", seed, tokens, settings)


TRAIN = Maker(section=ExpertSettings, build=trained, plan=trained_plan)


def build(sources: Sources, start: Start) -> Experts:
    """The experts of a recipe."""
    recipe = sources.recipe
    elsewhere = {
        expert: sources.expert(expert, name, path, start.seed)
        for name, domain in recipe.domains.items()
        for expert, path in zip(domain.names(name), domain.checkpoints, strict=False)
    }
    given = {name: step for name, step in elsewhere.items() if isinstance(step, ExternalCheckpoint)}
    descent = sources.add(VerifyExperts(seed=start.seed, given=given, **sources.place("given"))) if given else None
    steps: dict[str, ModelStep] = {}
    for expert, name in recipe.domain_of.items():
        if expert in elsewhere:
            steps[expert] = elsewhere[expert]
            continue
        domain, (how, settings) = recipe.domains[name], recipe.making(name)
        branch = Branch(
            expert, start.tokens[name], domain.tokens or 0, (domain.names(name).index(expert), domain.experts)
        )
        before = {*sources.steps}
        where = f"domains.{name}.expert" if isinstance(domain.expert, dict) else ""  # else it says what `train` does
        with told_at(where):
            steps[expert] = recipe.makers[how].build(sources, start, branch, settings)
        sources.said_at |= {sources.steps[key].label: where for key in sources.steps.keys() - before}
    return Experts(steps, descent, sources.vocabulary(start.seed, given))
