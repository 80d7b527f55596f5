"""A trial is one run of an arm, and no more than a recipe: written by hand, it meets the same folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from btx.compare.search import Grid, Point
from btx.conversions.contract import Conversion
from btx.conversions.planned import Config, Training
from btx.conversions.registry import conversions
from btx.errors import RecipeError, nearest
from btx.models import flops
from btx.recipe.compare_settings import Arm
from btx.recipe.fields import NAME
from btx.recipe.messages import sentences
from btx.recipe.recipe import Recipe

MANY = 10**9  # tokens at which whole steps are no matter


@dataclass(frozen=True)
class Trial:
    """One run of an arm: on which block, with how many tokens, at which rates, scored on which split."""

    arm: str
    block: int  # its seed
    tokens: int
    rates: Point
    split: Literal["select", "test"]

    @property
    def mark(self) -> str:
        """How its steps are told from those of others, for people."""
        final = " test" if self.split == "test" else ""
        return f"{self.arm} {self.tokens} {'/'.join(f'{rate:g}' for rate in self.rates)} #{self.block}{final}"


class Arms:
    """The arms of a recipe, as recipes."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.compare is None:
            raise RecipeError(
                "the recipe has no section `compare`. Add one, such as `compare: {}`, which compares btx, dense, "
                "upcycle and scratch."
            )
        self.recipe, self.settings = recipe, recipe.compare
        for name in self.settings.arms:
            self._known(name)
        if elsewhere := [name for name, domain in recipe.domains.items() if domain.checkpoint or not domain.data]:
            raise RecipeError(
                f"compare: the expert of {elsewhere[0]} was trained elsewhere, so its budget and rate cannot be set. "
                "Give the domain `data` and `tokens` instead of a checkpoint."
            )
        if not recipe.data.select:
            raise RecipeError("compare: rates are chosen on the select split, and data.select is 0. Raise it.")

    def _known(self, name: str) -> None:
        found = conversions()
        able = [one for one, conversion in found.items() if conversion.spend]
        if self.settings.conversion_of(name) not in able:
            said = self.settings.conversion_of(name)
            raise RecipeError(f"compare.arms.{name}: there is no conversion {said!r}; {nearest(said, able)}")

    def arm(self, name: str) -> Arm:
        """What is said of an arm."""
        return self.settings.arms[name]

    def conversion(self, name: str) -> Conversion:
        """The conversion that makes an arm."""
        return conversions()[self.settings.conversion_of(name)]

    def model(self, name: str) -> str:
        """The model that is compared: the last that the conversion makes, or the first where nothing follows."""
        return self.conversion(name).models[0 if self.arm(name).after_merge == 0 else -1]

    def grid(self, name: str) -> Grid:
        """The grid of an arm's rates: what later stages have as a multiple of the first is as in the recipe."""
        said = self._changed(self.recipe, self.arm(name).set, name)
        section = self.settings.conversion_of(name)
        if section in said.conversions and getattr(said, section) is None:
            said = self._changed(said, {section: {}}, name)
        paths = self._rates(name)
        found = [said.filled(getattr(said, path.partition(".")[0])).learning_rate for path in paths]
        return Grid(tuple(self.settings.rates), tuple(rate / found[0] for rate in found), self.settings.extensions)

    def _rates(self, name: str) -> tuple[str, ...]:
        """The settings of an arm's rates; no finetuning, no rate of it."""
        rates = self.conversion(name).rates
        return rates[:1] if self.arm(name).after_merge == 0 else rates

    def budget(self, name: str, index: int, seed: Config) -> int:
        """Tokens that an arm gets at a budget, given the config of the seed."""
        arm, settings, builtin = self.arm(name), self.settings, self.recipe.seed.builtin
        if arm.match == "total" and not self.recipe.seed.is_builtin:
            raise RecipeError(
                f"compare.arms.{name}: match is total, and the tokens that the seed was pretrained on are not known. "
                "Only a builtin seed can be matched in total; leave it at additional."
            )
        before = builtin.tokens if arm.match == "total" else 0
        if settings.flops:
            paid = settings.flops[index] + flops.training_flops(seed, before)
            tokens = paid / self._per_token(name, seed)
        else:
            tokens = (settings.budgets or [self.recipe.tokens_in_all])[index] + before
        return max(1, round(tokens * arm.tokens))

    def recipe_of(self, trial: Trial) -> Recipe:
        """The recipe of a trial."""
        name = trial.arm
        section = self.settings.conversion_of(name)
        changes: dict[str, Any] = {"compare": None, "train.seed": trial.block, "merge.seed": trial.block}
        changes |= dict.fromkeys(self.recipe.conversions)  # only what it takes itself
        if section in self.recipe.conversions:
            said = getattr(self.recipe, section)
            changes[section] = said.model_dump(exclude_unset=True) if said else {}
        changes |= {"evaluate.split": trial.split, **self.arm(name).set}
        spend = self.conversion(name).spend
        assert spend
        changes |= spend(self._changed(self.recipe, self.arm(name).set, name), trial.tokens, self.arm(name))
        changes |= dict(zip(self._rates(name), trial.rates, strict=True))
        return self._changed(self.recipe, changes, name)

    def _changed(self, recipe: Recipe, changes: Mapping[str, Any], name: str) -> Recipe:
        raw = recipe.model_dump(exclude_unset=True)
        for path, value in changes.items():
            _put(raw, _parts(path), value)
        try:
            return type(recipe).model_validate(raw)
        except ValidationError as error:
            raise RecipeError(f"compare.arms.{name}: " + "\n".join(sentences(error, type(recipe), NAME))) from error

    def trainings(self, trial: Trial, seed: Config) -> list[Training]:
        """What a trial trains after the seed."""
        recipe = self.recipe_of(trial)
        section = self.settings.conversion_of(trial.arm)
        return self.conversion(trial.arm).plan(recipe, recipe.sections.get(section), seed)

    def _per_token(self, name: str, seed: Config) -> float:
        """FLOPs of a token of an arm, over all its stages."""
        trial = Trial(name, self.settings.seeds[0], MANY, self.grid(name).together(self.settings.rates[0]), "select")
        return sum(flops_of(training) for training in self.trainings(trial, seed)) / MANY


def _parts(path: str) -> list[str]:
    """The keys of a dotted path; a domain's name may have dots of its own."""
    if path.startswith("domains."):
        return ["domains", *path.removeprefix("domains.").rsplit(".", 1)]
    return path.split(".")


def _put(raw: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value at a path of a recipe, sections that are not there made on the way."""
    *above, last = path
    for part in above:
        if raw.get(part) is None:
            raw[part] = {}
        raw = raw[part]
    raw[last] = value


def flops_of(training: Training) -> float:
    """FLOPs of a training: 6 · active parameters · tokens, as in every ledger here."""
    return float(flops.training_flops(training.config, training.tokens))
