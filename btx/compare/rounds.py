"""The rounds of a comparison: each is a static graph, and a function of the recipe and of what was published before.

So a comparison that was stopped goes on, and one that is done runs nothing. Steps that trials share run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

from btx.compare.arms import Arms, Trial
from btx.compare.lost import Lost, marker
from btx.compare.search import Point, at_edge, following
from btx.conversions.contract import EXPERT
from btx.conversions.pipeline import Graph
from btx.conversions.planned import seed_config
from btx.errors import DivergedError
from btx.graph.artifact import verify_once
from btx.graph.digests import Digests
from btx.graph.step import Step, undone
from btx.recipe.recipe import Recipe
from btx.steps.choice import Choice, mean_of
from btx.steps.comparison import Comparison, LostArm, Run
from btx.steps.measure import Measure
from btx.steps.merge import SEED

RunSteps = Callable[[str, list[Step]], None]
"""Runs what is not done of some steps, parents first, under a title; DivergedError names in `failed` who diverged."""
Tell = Callable[[str], None]  # a sentence for whoever watches
DIVERGED = float("inf")  # the loss of a trial whose training came to no number


class Rounds:
    """The comparison of a recipe."""

    def __init__(self, recipe: Recipe, base: Path) -> None:
        self.arms, self.base = Arms(recipe), base
        self.recipe, self.settings = recipe, self.arms.settings
        self.lost = Lost()
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

    def run(self, run_steps: RunSteps, tell: Tell) -> Comparison:
        """Every round, and at last the finals; returns the step that published the comparison."""
        number = 1
        while trials := self.searching():
            if self.digests:
                self.digests.save()
            title = f"round {number}: {len(trials)} trials"
            number += self._carry(title, [self.measure(trial) for trial in trials], run_steps, tell)
        while not self._carry("finals", [comparison := self.comparison()], run_steps, tell):
            pass  # without those that diverged in the finals
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
        if best is None:
            return known, []
        finals = {p: replace(known[best], tokens=tokens, rates=p) for p in grid.neighbours(best)}
        return finals, [trial for trial in finals.values() if not self._known(trial)]

    def _known(self, trial: Trial) -> bool:
        return self.measure(trial).done or self._diverged(trial)

    def _diverged(self, trial: Trial) -> bool:
        return self.measure(trial) in self.lost

    def _scores(self, trials: Mapping[Point, Trial]) -> dict[Point, float]:
        return {p: DIVERGED if self._diverged(t) else self._mean(self.measure(t)) for p, t in trials.items()}

    def _mean(self, measure: Measure) -> float:
        if measure.key not in self.means:
            verify_once(measure.folder)  # it may have been damaged since; the message then says what to remove
            self.means[measure.key] = mean_of(measure)
        return self.means[measure.key]

    def _best(self, trials: Mapping[Point, Trial]) -> Point | None:
        """The rates with the least loss; None if all diverged."""
        scores = self._scores(trials)
        best = min(scores, key=scores.__getitem__)
        return None if scores[best] == DIVERGED else best

    def _screened(self, arm: str, tokens: int) -> dict[Point, Trial]:
        """All trials over the grid, once they are done."""
        grid, known = self.arms.grid(arm), dict[Point, Trial]()
        part = max(1, round(tokens * self.settings.screen))
        while points := following(grid, self._scores(known)):
            known |= {p: Trial(arm, self.settings.seeds[0], part, p, "select") for p in points}
        return known

    # ---- what comes of it ----

    def choice(self, arm: str, tokens: int) -> Choice | None:
        """What was tried for an arm and chosen, as a step; None if it diverged at every rate."""
        counted, _ = self._search(arm, tokens)
        screened = self._screened(arm, tokens)
        confirmed = counted if self.settings.screen < 1 else {}
        best = self._best(counted)
        if best is None:
            return None
        graph = self.graph(next(iter(counted.values())))
        told = [_text(p) for p, t in {**screened, **confirmed}.items() if self._diverged(t)]
        return Choice(
            arm=arm, tokens=tokens, chosen=_text(best), edge=at_edge(self._scores(counted)),
            screened=self._measures(screened), confirmed=self._measures(confirmed), diverged=told,
            equivalents=len(screened) * self.settings.screen + len(confirmed),
            root=graph.root, where=graph.recipe.run, name=f"{arm} {tokens}",
        )  # fmt: skip

    def _measures(self, trials: Mapping[Point, Trial]) -> dict[str, Measure]:
        return {_text(p): self.measure(t) for p, t in trials.items() if not self._diverged(t)}

    def comparison(self) -> Comparison:
        """The finals on every block at the rates chosen, scored on test, as a step."""
        runs, finals, stages, choices, lost = [], [], [], [], []
        for n, budget in enumerate(self.budgets):
            for arm, tokens in budget.items():
                told = {"arm": arm, "conversion": self.settings.conversion_of(arm), "budget": n, "tokens": tokens}
                choice = self.choice(arm, tokens)
                rates = self._best(self._search(arm, tokens)[0])
                if choice is None or rates is None:
                    lost.append(LostArm(**told))
                    continue
                choices.append(choice)
                trials = [Trial(arm, block, tokens, rates, "test") for block in self.settings.seeds]
                if blocks := [trial.block for trial in trials if self._diverged(trial)]:
                    lost.append(LostArm(**told, rates=list(rates), blocks=blocks))
                    continue
                runs += [Run(**told, block=trial.block, rates=list(rates)) for trial in trials]
                finals += [self.measure(trial) for trial in trials]
                names = self._stages(trials)
                stages += [{name: self.measure(trial, name) for name in names} for trial in trials]
        self._require_control(lost)
        first = {
            block: Trial(runs[0].arm, block, runs[0].tokens, tuple(runs[0].rates), "test")
            for block in self.settings.seeds
        }
        seeds = {str(block): self.measure(trial, SEED) for block, trial in first.items()}
        graph, said = self.graph(first[self.settings.seeds[0]]), self.settings
        return Comparison(
            title=self.recipe.name, control=said.control, scratch=said.scratch, runs=runs, finals=finals,
            stages=stages, seeds=seeds, choices=choices, lost=lost, flops=said.flops,
            budgets=said.budgets or [self.recipe.tokens_in_all], root=graph.root, where=graph.recipe.run,
        )  # fmt: skip

    def _require_control(self, lost: Sequence[LostArm]) -> None:
        """DivergedError if the control diverged: then nothing can be judged."""
        for one in lost:
            if one.arm == self.settings.control:
                raise DivergedError(
                    f"compare: the control {one.arm} diverged {one.where} at {one.tokens:,} tokens, so nothing can be "
                    "judged against it. Lower compare.rates, or name another control."
                )

    def _stages(self, trials: Sequence[Trial]) -> list[str]:
        """Models on the way to the one that is compared, in order; none if an expert or its like diverged."""
        conversion, final = self.arms.conversion(trials[0].arm), self.arms.model(trials[0].arm)
        experts = [f"{EXPERT}{name}" for name in self.graph(trials[0]).recipe.domain_of]
        names = [one for name in conversion.on_the_way for one in (experts if name == EXPERT else [name])]
        fine = [name for name in names if not any(self.measure(trial, name) in self.lost for trial in trials)]
        if any(name.startswith(EXPERT) and name not in fine for name in names):
            return []
        return [name for name in fine if name != final]

    # ---- running ----

    def _carry(self, title: str, targets: Sequence[Step], run_steps: RunSteps, tell: Tell) -> bool:
        """Run what these need; returns whether none diverged. One that did is remembered, and the others go on."""
        steps = [step for step in _needed(targets) if step not in self.lost]
        if final := next((step for step in targets if isinstance(step, Comparison) and step in self.lost), None):
            seeds = ", ".join(block for block, one in final.seeds.items() if one in self.lost)
            raise DivergedError(f"compare: the seed of block {seeds} gives no finite loss. Lower its learning rate.")
        try:
            run_steps(title, steps)
        except DivergedError as error:
            failed = [step for step in steps if step.label in error.failed]
            if not failed:
                raise
            self.lost.add(failed, str(error))
            files = ", ".join(str(marker(step)) for step in failed)
            tell(f"{error}\nWhat rests on that counts as the worst; the rest goes on. To try it again, remove {files}")
            return False
        return True


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
