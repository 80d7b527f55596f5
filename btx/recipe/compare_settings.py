"""The section `compare`: which conversions are compared, at which budgets, on how many seed models, against what."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from btx.recipe.fields import Count, Positive, Text, Whole
from btx.recipe.settings import Settings


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
        default_factory=dict, description="any further settings of the recipe, such as {merge.router: random}"
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

    @field_validator("rates")
    @classmethod
    def _geometric(cls, rates: list[float]) -> list[float]:
        ratios = [after / before for before, after in itertools.pairwise(rates)]
        if min(ratios) <= 1 or max(ratios) > 1.05 * min(ratios):
            raise ValueError(f"must rise by one factor, such as [2.5e-4, 5e-4, 1e-3]; here the factors are {ratios}")
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
        if self.budgets and self.flops:
            raise ValueError("budgets and flops are two ways to say one thing; say one of them")
        return self

    def conversion_of(self, arm: str) -> str:
        """The conversion that an arm is made by."""
        return self.arms[arm].conversion or arm
