"""What a comparison costs at least and at most, before it starts: how far a search goes is not known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from btx.compare.arms import Trial, flops_of
from btx.compare.rounds import Rounds
from btx.compare.search import Point
from btx.conversions.planned import Training, seed_config


@dataclass(frozen=True)
class Price:
    """Trainings and training FLOPs, the seeds' pretraining included where btx makes them."""

    trainings: int
    flops: float


def bounds(rounds: Rounds) -> tuple[Price, Price]:
    """The least: no grid is extended, and what arms may share they share. The most: all are, and nothing is shared."""
    config = seed_config(rounds.recipe, rounds.base)
    seeds = len(rounds.settings.seeds) if rounds.recipe.seed.is_builtin else 0
    builtin = rounds.recipe.seed.builtin
    settings = rounds.recipe.train.model_copy(update={"batch_tokens": builtin.batch_tokens})
    pretraining = Training("seed", config, builtin.tokens, settings)
    least: dict[str, Training] = {}
    most: list[Training] = []
    for trial, needed in _trials(rounds):
        found = rounds.arms.trainings(trial, config)
        most += found
        if needed:
            least |= {f"{t.label} {t.tokens} {trial.block} {t.settings.model_dump_json()}": t for t in found}
    return _price([*least.values()], pretraining, seeds), _price(most, pretraining, seeds)


def _price(trainings: list[Training], pretraining: Training, seeds: int) -> Price:
    return Price(len(trainings) + seeds, sum(map(flops_of, trainings)) + seeds * flops_of(pretraining))


def _trials(rounds: Rounds) -> Iterator[tuple[Trial, bool]]:
    """Every trial that there may be, and whether there will be one like it; rates stand for those not known yet."""
    settings, first = rounds.settings, rounds.settings.seeds[0]
    for budget in rounds.budgets:
        for arm, tokens in budget.items():
            grid = rounds.arms.grid(arm)
            middle: Point = grid.together(grid.rates[len(grid.rates) // 2])
            screened = Trial(arm, first, max(1, round(tokens * settings.screen)), middle, "select")
            for point in (*map(grid.together, grid.rates), *grid.around(middle)):
                yield replace(screened, rates=point), True
            for number in range(settings.extensions):
                yield replace(screened, rates=grid.rungs[number]), False
            if settings.screen < 1:
                for point in grid.neighbours(middle):
                    yield replace(screened, tokens=tokens, rates=point), True
            for block in settings.seeds:
                yield Trial(arm, block, tokens, middle, "test"), True
