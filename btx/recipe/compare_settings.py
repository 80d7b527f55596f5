"""The section `compare`: which conversions are compared, at which budgets, on how many seed models, against what."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from btx.recipe.fields import NAME, Count, Positive, Text, Whole
from btx.recipe.messages import SIGNS
from btx.recipe.settings import Settings

MEAN = "mean"  # over the domains: the name of a column
LEAST_FACTOR = 1.1  # of one rate to the next: rates have three significant digits, and half of a factor must show


class Arm(Settings):
    """One contender: a conversion, and how it departs from the recipe."""

    conversion: Text | None = Field(None, description="a file of btx/conversions/; default: as the arm is called")
    after_merge: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="btx: share of its tokens that the finetuning takes; default: as in the recipe"
    )
    tokens: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the budget that it gets; less than 1 plants an effect that the comparison must find"
    )
    match: Literal["additional", "total"] = Field(
        "additional", description="total: its budget is the seed's pretraining tokens besides (scratch)"
    )
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="any further settings of the recipe, such as {merge.router: orthogonal}; a seed is that of block "
        "0, and the others count on from it",
    )


class CompareSettings(Settings):
    """A comparison on one seed, data and budget: rates chosen on the select split, finals on test."""

    arms: dict[str, Arm] = Field(
        default_factory=lambda: {name: Arm() for name in ("btx", "dense", "upcycle", "scratch")}, min_length=2
    )
    control: Text = Field("dense", description="the arm that all others are judged against")
    scratch: Text = Field("scratch", description="the arm that the tax is reckoned against, where there is one")
    budgets: list[Count] = Field(
        default_factory=list, description="tokens after the seed, of each arm; default: what the recipe's BTX takes"
    )
    flops: list[Positive] = Field(
        default_factory=list, description="budgets as FLOPs instead: each arm gets the tokens that they pay for"
    )
    rates: list[Positive] = Field(
        default_factory=lambda: [2.5e-4, 5e-4, 1e-3, 2e-3], min_length=2,
        description="peak learning rates that are tried for every arm, each a fixed multiple of the one before",
    )  # fmt: skip
    seeds: list[Whole] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1,
        description="of the seed models (builtin), or of the draws where the seed is a checkpoint; a block each",
    )  # fmt: skip
    screen: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of the budget at which rates are tried; the best and its neighbours then run at 1"
    )
    extensions: Whole = Field(2, description="rates beyond the grid that are tried while the best is at its edge")

    @field_validator("arms")
    @classmethod
    def _names(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        for name in arms:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"{name!r:.80} cannot name an arm: {SIGNS}")
            if name.lower() in ("seed", MEAN):
                raise ValueError(f"{name!r} is another row or column of the table; rename the arm")
        if twice := [name for name, count in Counter(map(str.lower, arms)).items() if count > 1]:
            raise ValueError(f"two arms are called {twice[0]!r} but for case; choose clearer names")
        return arms

    @field_validator("budgets", "flops")
    @classmethod
    def _rising(cls, budgets: list[float]) -> list[float]:
        if any(after <= before for before, after in itertools.pairwise(budgets)):
            raise ValueError("must rise, each once: the answer is about the last, the largest")
        return budgets

    @field_validator("rates")
    @classmethod
    def _geometric(cls, rates: list[float]) -> list[float]:
        ratios = [after / before for before, after in itertools.pairwise(rates)]
        if min(ratios) < LEAST_FACTOR or max(ratios) > 1.05 * min(ratios):
            raise ValueError(
                f"must rise by one factor of {LEAST_FACTOR} or more, such as [2.5e-4, 5e-4, 1e-3]; here the factors "
                f"are {', '.join(f'{ratio:.3g}' for ratio in ratios)}"
            )
        return rates

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands there twice; blocks must differ")
        return seeds

    @model_validator(mode="after")
    def _known(self) -> CompareSettings:
        if self.control not in self.arms:
            raise ValueError(
                f"control is {self.control!r}, and no arm is called that; name one of {', '.join(self.arms)}"
            )
        if "scratch" in self.model_fields_set and self.scratch not in self.arms:
            raise ValueError(
                f"scratch is {self.scratch!r}, and no arm is called that; name one of {', '.join(self.arms)}"
            )
        if self.budgets and self.flops:
            raise ValueError("budgets and flops are two ways to say one thing; say one of them")
        return self

    def conversion_of(self, arm: str) -> str:
        """The conversion that an arm is made by."""
        return self.arms[arm].conversion or arm
