"""The rounds of a comparison: each is a static graph, and a function of the recipe and of what was published before.

So a comparison that was stopped goes on, and one that is done runs nothing. Steps that trials share run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

from btx.compare.arms import Arms, Trial
from btx.compare.search import Point, at_edge, following
from btx.conversions.pipeline import Graph
from btx.conversions.planned import seed_config
from btx.errors import DivergedError
from btx.graph.digests import Digests
from btx.graph.step import Step, undone
from btx.recipe.recipe import Recipe
from btx.steps.choice import Choice, mean_of
from btx.steps.comparison import Comparison, Run
from btx.steps.measure import Measure
from btx.steps.merge import SEED

RunSteps = Callable[[str, list[Step]], None]
"""Runs what is not done of some steps, parents first, under a title; DivergedError names in `failed` who diverged."""
DIVERGED = float("inf")  # the loss of a trial whose training came to no number


class Rounds:
    """The comparison of a recipe."""

    def __init__(self, recipe: Recipe, base: Path) -> None:
        self.arms, self.base = Arms(recipe), base
        self.recipe, self.settings = recipe, self.arms.settings
        self.diverged: set[str] = set()  # keys of the trainings that did
        self.digests: Digests | None = None  # of files that all graphs name, each hashed once
        self.graph = cache(self._graph)
        self.means: dict[str, float] = {}  # of measurements that are done, by key

    def _graph(self, trial: Trial) -> Graph:
        made = Graph(self.arms.recipe_of(trial), self.base, variant=trial.mark, digests=self.digests)
        self.digests = made.digests
        return made

    @cached_property
    def budgets(self) -> list[dict[str, int]]:
        """Tokens of each arm, by budget."""
        config = seed_config(self.recipe, self.base)
        count = len(self.settings.flops or self.settings.budgets) or 1
        return [{arm: self.arms.budget(arm, n, config) for arm in self.settings.arms} for n in range(count)]

    def measure(self, trial: Trial, model: str | None = None) -> Measure:
        """The step that scores a trial, or another model of its graph."""
        found = self.graph(trial).steps[f"measure:{model or self.arms.model(trial.arm)}"]
        assert isinstance(found, Measure)
        return found

    def check(self) -> None:
        """Look at the input of one trial of each arm, whose recipe differs from the others' in numbers alone."""
        for trial in self._first():
            graph = self.graph(trial)
            graph.check(undone(_needed([self.measure(trial)])))

    def _first(self) -> Iterator[Trial]:
        for arm, tokens in self.budgets[-1].items():
            yield Trial(
                arm, self.settings.seeds[0], tokens, self.arms.grid(arm).together(self.settings.rates[0]), "select"
            )

    # ---- the search ----

    def run(self, run_steps: RunSteps) -> Comparison:
        """Every round, and at last the finals; returns the step that published the comparison."""
        number = 0
        while trials := self.searching():
            if self.digests:
                self.digests.save()
            number += 1
            self._carry(f"round {number}: {len(trials)} trials", [self.measure(trial) for trial in trials], run_steps)
        comparison = self.comparison()
        self._carry("finals", [comparison], run_steps)
        return comparison

    def searching(self) -> list[Trial]:
        """The trials of the next round: what no search can go on without."""
        return [trial for tokens in self.budgets for arm in tokens for trial in self._search(arm, tokens[arm])[1]]

    def _search(self, arm: str, tokens: int) -> tuple[dict[Point, Trial], list[Trial]]:
        """The trials of an arm that count for its choice, by their rates, and those that have to run before.

        On the first block: at a share of the budget over the grid, then with all of it the best and its neighbours.
        """
        grid, screen = self.arms.grid(arm), self.settings.screen
        known: dict[Point, Trial] = {}
        while points := following(grid, self._scores(known)):
            trials = {
                p: Trial(arm, self.settings.seeds[0], max(1, round(tokens * screen)), p, "select") for p in points
            }
            if waiting := [trial for trial in trials.values() if not self._known(trial)]:
                return known, waiting
            known |= trials
        if screen == 1:
            return known, []
        best = self._best(known)
        finals = {p: replace(known[best], tokens=tokens, rates=p) for p in grid.neighbours(best)}
        return finals, [trial for trial in finals.values() if not self._known(trial)]

    def _known(self, trial: Trial) -> bool:
        return self.measure(trial).done or self._diverged(trial)

    def _diverged(self, trial: Trial) -> bool:
        return bool(self.diverged) and self._rests_on_diverged(self.measure(trial))

    def _scores(self, trials: Mapping[Point, Trial]) -> dict[Point, float]:
        return {p: DIVERGED if self._diverged(t) else self._mean(self.measure(t)) for p, t in trials.items()}

    def _mean(self, measure: Measure) -> float:
        if measure.key not in self.means:
            self.means[measure.key] = mean_of(measure)
        return self.means[measure.key]

    def _best(self, trials: Mapping[Point, Trial]) -> Point:
        scores = self._scores(trials)
        best = min(scores, key=scores.__getitem__)
        if scores[best] == DIVERGED:
            raise DivergedError(
                f"compare: {trials[best].arm} diverged at every rate that was tried. Lower compare.rates."
            )
        return best

    def _screened(self, arm: str, tokens: int) -> dict[Point, Trial]:
        """All trials over the grid, once they are done."""
        grid, known = self.arms.grid(arm), dict[Point, Trial]()
        part = max(1, round(tokens * self.settings.screen))
        while points := following(grid, self._scores(known)):
            known |= {p: Trial(arm, self.settings.seeds[0], part, p, "select") for p in points}
        return known

    # ---- what comes of it ----

    def choice(self, arm: str, tokens: int) -> Choice:
        """What was tried for an arm and chosen, as a step."""
        counted, _ = self._search(arm, tokens)
        screened = self._screened(arm, tokens)
        confirmed = counted if self.settings.screen < 1 else {}
        grid, best = self.arms.grid(arm), self._best(counted)
        graph = self.graph(next(iter(counted.values())))
        told = [_text(p) for p, t in {**screened, **confirmed}.items() if self._diverged(t)]
        return Choice(
            arm=arm, tokens=tokens, chosen=_text(best), edge=at_edge(grid, self._scores(screened)),
            screened=self._measures(screened), confirmed=self._measures(confirmed), diverged=told,
            equivalents=len(screened) * self.settings.screen + len(confirmed),
            root=graph.root, where=graph.recipe.run, name=f"{arm} {tokens}",
        )  # fmt: skip

    def _measures(self, trials: Mapping[Point, Trial]) -> dict[str, Measure]:
        return {_text(p): self.measure(t) for p, t in trials.items() if not self._diverged(t)}

    def comparison(self) -> Comparison:
        """The finals on every block at the rates chosen, scored on test, as a step."""
        runs, finals, stages, choices = [], [], [], []
        for n, budget in enumerate(self.budgets):
            for arm, tokens in budget.items():
                choices.append(self.choice(arm, tokens))
                rates = self._best(self._search(arm, tokens)[0])
                for block in self.settings.seeds:
                    trial = Trial(arm, block, tokens, rates, "test")
                    conversion = self.settings.conversion_of(arm)
                    runs.append(
                        Run(arm=arm, conversion=conversion, budget=n, tokens=tokens, block=block, rates=list(rates))
                    )
                    finals.append(self.measure(trial))
                    stages.append({name: self.measure(trial, name) for name in self._stages(trial)})
        first = {
            block: Trial(runs[0].arm, block, runs[0].tokens, tuple(runs[0].rates), "test")
            for block in self.settings.seeds
        }
        seeds = {str(block): self.measure(trial, SEED) for block, trial in first.items()}
        graph = self.graph(first[self.settings.seeds[0]])
        return Comparison(
            title=self.recipe.name, control=self.settings.control, scratch=self.settings.scratch, runs=runs,
            finals=finals, stages=stages, seeds=seeds, choices=choices, root=graph.root, where=graph.recipe.run,
        )  # fmt: skip

    def _stages(self, trial: Trial) -> list[str]:
        """Models on the way to a merged one, in order: the experts, their average, the fresh mixture."""
        if self.settings.conversion_of(trial.arm) != "btx":
            return []
        final = self.arms.model(trial.arm)
        experts = [f"expert:{name}" for name in self.graph(trial).recipe.domain_of]
        return [name for name in (*experts, "average", "merged") if name != final]

    # ---- running ----

    def _carry(self, title: str, targets: Sequence[Step], run_steps: RunSteps) -> None:
        """Run what these need; a training that diverges is remembered, and the others go on."""
        while True:
            steps = _needed(targets)
            lost = {step.key for step in steps if self._rests_on_diverged(step)}
            left = [step for step in steps if step.key not in lost]
            try:
                run_steps(title, left)
            except DivergedError as error:
                failed = {step.key for step in left if step.label in error.failed}
                if not failed or any(isinstance(target, Comparison) for target in targets):
                    raise
                self.diverged |= failed
                continue
            return

    def _rests_on_diverged(self, step: Step) -> bool:
        return step.key in self.diverged or any(self._rests_on_diverged(parent) for parent in step.parents.values())


def _text(point: Point) -> str:
    return "/".join(f"{rate:g}" for rate in point)


def _needed(targets: Iterable[Step]) -> list[Step]:
    """What some steps need, themselves included, parents first, each once by its key."""
    found: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.key in found:
            return
        for parent in step.parents.values():
            visit(parent)
        if step.kind != "given":
            found[step.key] = step

    for step in targets:
        visit(step)
    return list(found.values())
