"""Recipe to graph of steps. Building the graph trains nothing and writes nothing.

`Graph.check` validates every input first, so that a bad one is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from btx.checkpoints.hub import short_name
from btx.conversions import STAGES, experts
from btx.conversions.place import check_place
from btx.conversions.registry import conversions
from btx.conversions.sources import Model, Sources, Start
from btx.conversions.tasks import solved
from btx.errors import RecipeError, nearest, told_at
from btx.graph.digests import Digests
from btx.graph.step import Step
from btx.probes.registry import ALWAYS, probes
from btx.recipe.paths import expanded
from btx.recipe.recipe import Recipe
from btx.recipe.settings import Settings
from btx.steps.adapted import MergedLora
from btx.steps.evaluate import Evaluate
from btx.steps.export import Export
from btx.steps.given import ExternalCheckpoint
from btx.steps.measure import Measure
from btx.steps.merge import SEED, Merge
from btx.steps.report import Report
from btx.steps.tokens import Reads

SELECTED = 4  # the select split is scored on a quarter of the tokens: enough to see a harm, and it costs little


class Graph:
    """All steps of a recipe by label, parents before children."""

    def __init__(self, recipe: Recipe, base: Path, *, variant: str = "", digests: Digests | None = None) -> None:
        self.recipe, self.base = resolved(recipe), base
        self.root = expanded(recipe.run.directory, "run.directory").absolute() / recipe.name
        self.digests = digests or Digests(self.root / "work" / "digests.json")
        self.sources = Sources(self.recipe, base, root=self.root, digests=self.digests, variant=variant)
        self.steps = self.sources.steps
        self._build()

    def _build(self) -> None:
        sources, recipe = self.sources, self.recipe
        start = sources.start()
        made = experts.build(sources, start)
        self.branches = {  # the experts that are made here, by label
            label: name for name, expert in made.steps.items() for label, step in self.steps.items()
            if step is expert and not isinstance(step, MergedLora)
        }  # fmt: skip
        models = {SEED: Model(start.seed), **made.models(sources, start)}
        for name, conversion in conversions().items():
            settings = recipe.sections.get(name)
            if conversion.section is None or (settings and start.tokens):
                models |= conversion.build(sources, start, made, settings)
        if not start.tokens:
            return  # experts trained elsewhere are merged, but there are no documents to score
        evaluate = self._measured(models, start)
        exported = next(made.step for made in models.values() if made.exported)
        export = sources.add(Export(
            model=exported, evaluate=evaluate, settings=recipe.export,
            title=recipe.export.name or recipe.name,
            base_model=recipe.export.base_model or short_name(recipe.seed.checkpoint), **sources.place(),
        ))  # fmt: skip
        sources.add(Report(evaluate=evaluate, export=export, **sources.place()))

    def _measured(self, models: dict[str, Model], start: Start) -> Evaluate:
        """One Measure step per model and probe, and the Evaluate step that compares them."""
        recipe, sources = self.recipe, self.sources
        length = recipe.evaluate.sequence_length or recipe.train.sequence_length

        def measured(name: str, settings: Settings | None = None) -> dict[str, Measure]:
            probe = probes()[name]
            said = {"probe": name, "probe_version": probe.version, "options": settings.identity() if settings else {}}
            return {
                model: sources.add(Measure(
                    model=made.step, reference=start.seed if probe.reference else None, **said,
                    tokens=start.tokens if name == ALWAYS else sources.all_data(start),  # the seed's text is neutral
                    own=made.tokens, length=length, settings=recipe.evaluate.measure, rule=made.rule,
                    **sources.place(model if name == ALWAYS else f"{name}:{model}"),
                ))
                for model, made in models.items()
            }  # fmt: skip

        always = measured(ALWAYS)
        others = {name: measured(name, settings) for name, settings in recipe.probing.items()}
        tasks, overlaps = solved(sources, start, models)
        return sources.add(Evaluate(
            seed=start.seed, measures=always, others=others, tokens=start.tokens, settings=recipe.evaluate,
            tasks=tasks, overlaps=overlaps,
            selected=self._selected(models, always), **sources.place(),
        ))  # fmt: skip

    def _selected(self, models: dict[str, Model], measures: dict[str, Measure]) -> dict[str, Measure]:
        """The exported model and what it was finetuned from, on the select split: whether it gained there."""
        made = next((name for name, model in models.items() if model.exported and model.before), None)
        if made is None or not self.recipe.data.select:
            return {}
        said = self.recipe.evaluate.measure
        settings = said.model_copy(update={"split": "select", "tokens": max(1, said.tokens // SELECTED)})
        return {
            name: self.sources.add(measures[name].model_copy(update={
                "settings": settings, "optional": True, **self.sources.place(f"select:{name}")
            }))
            for name in (models[made].before, made)
        }  # fmt: skip

    def export_unmeasured(self) -> None:
        """Export without the evaluation if that is not done yet; the model card then says so."""
        export = self.steps["export"]
        assert isinstance(export, Export)
        if export.evaluate and not export.evaluate.done:
            self.sources.add(Export(model=export.model, evaluate=None, settings=export.settings, title=export.title,
                                    base_model=export.base_model, **self.sources.place()))  # fmt: skip

    # ---- which steps run ----

    def labels(self, stage: str, domain: str | None = None) -> list[str]:
        """Labels of a stage, such as train (one per expert trained here); RecipeError for an unknown one."""
        if domain is not None and domain not in {**self.recipe.domains, **self.recipe.domain_of}:
            raise RecipeError(f"there is no domain {domain!r}; {nearest(domain, self.recipe.domains)}")
        if stage == "train":
            names = self.recipe.domains[domain].names(domain) if domain in self.recipe.domains else [domain]
            return [label for label, name in self.branches.items() if not domain or name in names]
        wanted = f"{stage}:{domain}" if domain else stage
        several = self.recipe.domains[domain].names(domain) if domain in self.recipe.domains else [domain]
        mine = {f"{stage}:{name}" for name in several}
        found = [label for label in self.steps if label in mine or (not domain and label.split(":")[0] == stage)]
        if not found and stage in STAGES and "finetune" not in self.steps:
            raise RecipeError(
                "no domain has `data`, so there is nothing to finetune or evaluate on. Give a domain some, or stop "
                "earlier: --until merge."
            )
        if not found:
            raise RecipeError(f"there is no step {wanted!r}; {nearest(wanted, self.steps)}")
        return found

    def needed(self, labels: Iterable[str]) -> list[Step]:
        """The steps of these labels and all their ancestors, parents first."""
        wanted: dict[str, Step] = {}

        def visit(step: Step) -> None:
            for parent in step.parents.values():
                visit(parent)
            wanted.setdefault(step.label, step)

        for label in labels:
            visit(self.steps[label])
        return [s for s in wanted.values() if not isinstance(s, ExternalCheckpoint)]

    def check(self, steps: list[Step]) -> None:
        """Validate all inputs of the unfinished steps; raises a BtxError for a bad one, writes nothing.

        Documents are read last, since that takes longest.
        """
        check_place(self.recipe.run, self.root)
        merge = self.steps["merge"]
        assert isinstance(merge, Merge)
        labels = {step.label for step in steps}
        branches = {self.steps[label].key for label in self.branches}
        if merge.label not in labels and any(step.key in branches for step in steps):
            merge.check_layout()  # an impossible merge is refused before experts are trained for it
        asked: dict[str, int] = {}
        for step in steps:
            for label, length in step.asks.items():
                asked[label] = max(length, asked.get(label, 0))
        known = {step.label: step for step in self.steps.values()}
        looked_at = {step.label: step for step in (*steps, *(known[label] for label in asked))}
        for step in sorted(looked_at.values(), key=lambda step: isinstance(step, Reads)):
            with told_at(self.sources.said_at.get(step.label, "")):
                step.check(asked.get(step.label, 0))


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what is `auto` and hashed resolved: precision by the device that `run` names, and the router
    with the tokens that make it."""
    from btx.recipe.precision import automatic

    domains = recipe.domains.values()
    trained_on = max(domain.tokens or 0 for domain in domains)
    found: dict[str, Any] = {"merge": recipe.merge.resolved(sum(bool(d.data) for d in domains), trained_on)}
    for name in ("train", "evaluate", "finetune", *recipe.sections):
        section = getattr(recipe, name)
        own = name in ("train", "evaluate") or "precision" in section.model_fields_set  # else inherited from `train`
        if own and getattr(section, "precision", None) == "auto":
            found[name] = section.model_copy(update={"precision": automatic(recipe.run.device)})
    return recipe.model_copy(update=found)
