"""Recipe to graph of steps. Building the graph trains nothing and writes nothing.

Every input is looked at first (`Graph.check`), so that a bad one is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from btx.conversions.place import check_place
from btx.data import corpus
from btx.data.texts import Texts
from btx.errors import ArtifactError, RecipeError, nearest
from btx.graph.artifact import fingerprint
from btx.graph.digests import Digests
from btx.graph.step import Step
from btx.recipe.merge_settings import FROM_DATA
from btx.recipe.mixing import both_stages, mix
from btx.recipe.paths import expanded
from btx.recipe.recipe import Recipe
from btx.recipe.settings import DataSettings, DenseSettings, TrainSettings
from btx.steps.adapted import Adapted
from btx.steps.branch import Branch, Descent
from btx.steps.dense import Dense
from btx.steps.evaluate import Evaluate
from btx.steps.export import Export
from btx.steps.finetune import Finetune
from btx.steps.given import Given
from btx.steps.merge import Average, Merge, check_method
from btx.steps.pretrain import Pretrain
from btx.steps.report import Report
from btx.steps.tokenizer import Tokenizer
from btx.steps.tokens import Reads, TokensStep
from btx.steps.train import Train
from btx.steps.vocabulary import VocabularyStep

S = TypeVar("S", bound=Step)
ANSWERS = "@answers"  # behind the name of the seed's tokens where only answers are learned, other than pretraining did
MERGED = "@merged"  # behind the name of tokens that are in the merged model's tokenizer
STAGES = ("branch", "train", "merge", "finetune", "evaluate", "export", "report")


class Graph:
    """All steps of a recipe by label, parents before children."""

    def __init__(self, recipe: Recipe, base: Path) -> None:
        self.recipe, self.base = resolved(recipe), base
        self.root = expanded(recipe.run.directory, "run.directory").absolute() / recipe.name
        self.digests = Digests(self.root / "work" / "digests.json")
        self.steps: dict[str, Step] = {}
        self.texts = Texts(recipe, base, self.digests)
        self._build()

    def _add(self, step: S) -> S:
        self.steps[step.label] = step
        return step

    def _place(self, name: str | None = None) -> dict[str, object]:
        return {"root": self.root, "where": self.recipe.run, "name": name}

    def _build(self) -> None:
        recipe = self.recipe
        seed, tokenizer = self._seed()
        tokens = {name: self._tokens(name, d.data, d.valid, tokenizer) for name, d in recipe.domains.items() if d.data}
        elsewhere = {
            expert: self._expert(expert, name, path, seed)
            for name, domain in recipe.domains.items()
            for expert, path in zip(domain.names(name), domain.checkpoints, strict=False)
        }
        given = {name: step for name, step in elsewhere.items() if isinstance(step, Given)}
        branch = self._add(Branch(seed=seed, **self._place()))
        descent = self._add(Descent(seed=seed, given=given, **self._place("given"))) if given else None
        experts: dict[str, Step] = {}
        for expert, name in recipe.domain_of.items():
            domain = recipe.domains[name]
            experts[expert] = elsewhere.get(expert) or self._add(
                Train(branch=branch, tokens=tokens[name], budget=domain.tokens, train=recipe.train,
                      part=(domain.names(name).index(expert), domain.experts), **self._place(expert))
            )  # fmt: skip
        vocabulary = self._vocabulary(seed, given)
        models = {"branch": branch, "descent": descent, "experts": experts, "settings": recipe.merge,
                  "vocabulary": vocabulary, **self._place()}  # fmt: skip
        average = self._add(Average(**{**models, "settings": recipe.merge.averaging}))
        texts = {name: (d.data, d.valid) for name, d in recipe.domains.items() if d.data}
        if recipe.seed.sources:
            texts["seed"] = recipe.seed.sources, recipe.seed.valid
        joint, suffix = (vocabulary, MERGED) if vocabulary else (tokenizer, "")
        mixed = {name: self._tokens(name, *text, joint, suffix) for name, text in texts.items()}
        known = router_data(recipe, mixed)
        others = {expert: name for expert, name in recipe.domain_of.items() if known and expert != name}
        merge = self._add(Merge(tokens=known, domains=others, **models))
        check_method(recipe.merge, list(merge.models))
        if not tokens:
            return  # experts that were trained elsewhere can be merged, no more
        own = {f"expert:{e}": {n: self._tokens(n, *texts[n], given[e], f"@{e}", seed) for n in tokens}
               for e in (vocabulary.experts if vocabulary else ())}  # fmt: skip
        if vocabulary:
            own |= {model: {n: mixed[n] for n in tokens} for model in ("average", "merged", "finetuned")}
        dense = self._dense(
            branch, {n: self._tokens(n, *t, tokenizer) for n, t in texts.items()} if recipe.dense else {}
        )
        self._after(average, merge, tokens, mixed, own, dense)

    def _after(
        self, average: Average, merge: Merge, tokens: dict[str, TokensStep], mixed: dict[str, TokensStep],
        own: dict[str, dict[str, TokensStep]], dense: Dense | None,
    ) -> None:  # fmt: skip
        recipe = self.recipe
        finetune = self._add(
            Finetune(
                merge=merge, tokens=mixed, weights=mix(recipe, list(mixed)), settings=recipe.finetuning, **self._place()
            )
        )
        length = recipe.evaluate.sequence_length or recipe.train.sequence_length
        evaluate = self._add(
            Evaluate(
                average=average,
                finetune=finetune,
                dense=dense,
                tokens=tokens,
                own=own,
                length=length,
                settings=recipe.evaluate,
                **self._place(),
            )
        )
        base_model = recipe.export.base_model or Path(recipe.seed.checkpoint).name
        export = self._add(
            Export(
                evaluate=evaluate,
                settings=recipe.export,
                title=recipe.export.name or recipe.name,
                base_model=base_model,
                **self._place(),
            )
        )
        self._add(Report(evaluate=evaluate, export=export, **self._place()))

    def _dense(self, branch: Branch, tokens: dict[str, TokensStep]) -> Dense | None:
        """The control on the same data as both stages of BTX, where the recipe asks for it."""
        settings = self.recipe.continuing
        if settings is None:
            return None
        said = settings.model_dump(exclude=set(DenseSettings.model_fields) - set(TrainSettings.model_fields))
        shares = mix(self.recipe, list(tokens), "dense") if settings.mix else both_stages(self.recipe, list(tokens))
        return self._add(Dense(
            branch=branch, tokens=tokens, weights=shares, budget=settings.tokens or self.recipe.tokens_in_all,
            train=TrainSettings(**said), **self._place(),
        ))  # fmt: skip

    def _seed(self) -> tuple[Step, Step]:
        """The seed's step, and the step whose folder has its tokenizer."""
        seed = self.recipe.seed
        if not seed.is_builtin:
            given = self._given("seed", seed.checkpoint)
            return given, given
        plain = self.recipe.data.model_copy(update={"loss_on": "all"})  # pretraining learns every token
        read = {"data": DataSettings(**plain.model_dump(exclude={"valid_bytes", "date"}))}  # by a tokenizer's training
        reads = {**self.texts.reads("seed", seed.sources, seed.valid), **read}
        tokenizer = self._add(Tokenizer(vocab_size=seed.builtin.vocab_size, **reads, **self._place()))
        tokens = self._tokens("seed", seed.sources, seed.valid, tokenizer, data_settings=plain)
        own = {"learning_rate": seed.builtin.learning_rate, "batch_tokens": seed.builtin.batch_tokens}
        train = self.recipe.train.model_copy(update=own)
        return self._add(
            Pretrain(tokenizer=tokenizer, tokens=tokens, shape=seed.builtin, train=train, **self._place())
        ), tokenizer

    def _given(self, name: str, checkpoint: str, domain: str | None = None) -> Given:
        """A checkpoint folder of the recipe, its header and config checked, its content hashed."""
        from btx.checkpoints.reader import Checkpoint

        key = f"domains.{domain}.checkpoint" if domain else "seed.checkpoint"
        try:
            path = (self.base / Path(checkpoint).expanduser()).resolve()
            found, hint = path.is_dir(), corpus.hint(path)
        except (OSError, RuntimeError) as error:  # an unknown ~user, a name too long, a folder closed to us
            raise ArtifactError(f"{key}: {checkpoint:.200} cannot be looked up: {error}. Correct the path.") from error
        if not found:
            raise ArtifactError(
                f"{key}: there is no folder {path}{hint}. A checkpoint is a local Hugging Face folder; "
                "relative paths start at the recipe."
            )
        checkpoint_ = Checkpoint(path)
        return Given(content=checkpoint_.digest(self.digests), path=path, **self._place(name))

    def _expert(self, name: str, domain: str, checkpoint: str, seed: Step) -> Step:
        """An expert trained elsewhere: a model, or a LoRA adapter of the seed."""
        from btx.merge.adapter import WEIGHTS, is_adapter
        from btx.merge.lora_config import CONFIG

        try:
            path = (self.base / Path(checkpoint).expanduser()).resolve()
            found = is_adapter(path)
        except (OSError, RuntimeError):
            found = False
        if not found:
            return self._given(name, checkpoint, domain)
        files = [path / file for file in (CONFIG, WEIGHTS) if (path / file).is_file()]
        content = fingerprint([[file.name, self.digests(file)] for file in files])
        return self._add(Adapted(seed=seed, content=content, path=path, **self._place(name)))

    def _vocabulary(self, seed: Step, given: dict[str, Given]) -> VocabularyStep | None:
        """What makes one tokenizer of several, where an expert has tokens of its own."""
        from btx.merge.vocabulary import is_extended

        if not isinstance(seed, Given):
            return None
        experts = {name: step for name, step in given.items() if is_extended(seed.path, step.path)}
        return self._add(VocabularyStep(seed=seed, experts=experts, **self._place())) if experts else None

    def _tokens(
        self, name: str, data: list[str], valid: list[str], tokenizer: Step, suffix: str = "",
        template: Step | None = None, data_settings: DataSettings | None = None,
    ) -> TokensStep:  # fmt: skip
        data_settings = data_settings or self.recipe.data
        if name == "seed" and self.recipe.seed.is_builtin and data_settings.loss_on != "all":
            suffix += ANSWERS
        label = f"tokens:{name}{suffix}"
        if label in self.steps:
            found = self.steps[label]
            assert isinstance(found, TokensStep)
            return found
        reads = self.texts.reads("seed" if name == "seed" else f"domains.{name}", data, valid)
        reads["data"] = data_settings
        return self._add(TokensStep(tokenizer=tokenizer, template=template, **reads, **self._place(name + suffix)))

    # ---- what is to be done ----

    def labels(self, stage: str, domain: str | None = None) -> list[str]:
        """Labels of a stage, such as train (one per trained domain); RecipeError for an unknown one."""
        if domain is not None and domain not in {**self.recipe.domains, **self.recipe.domain_of}:
            raise RecipeError(f"there is no domain {domain!r}; {nearest(domain, self.recipe.domains)}")
        wanted = f"{stage}:{domain}" if domain else stage
        several = self.recipe.domains[domain].names(domain) if domain in self.recipe.domains else [domain]
        mine = {f"{stage}:{name}" for name in several}
        found = [label for label in self.steps if label in mine or (not domain and label.split(":")[0] == stage)]
        if not found and stage == "train":
            return []  # every expert was trained elsewhere: checked and merged, not trained
        if not found and stage in STAGES and "finetune" not in self.steps:
            raise RecipeError(
                "no domain has `data`, so there is nothing to finetune or evaluate on. Give a domain some, or stop "
                "before: --until merge."
            )
        if not found:
            raise RecipeError(f"there is no step {wanted!r}; {nearest(wanted, self.steps)}")
        return found

    def needed(self, labels: Iterable[str]) -> list[Step]:
        """The steps that must be there for these, themselves included, parents first."""
        wanted: dict[str, Step] = {}

        def visit(step: Step) -> None:
            for parent in step.parents.values():
                visit(parent)
            wanted.setdefault(step.label, step)

        for label in labels:
            visit(self.steps[label])
        return [s for s in wanted.values() if not isinstance(s, Given)]

    def check(self, steps: list[Step]) -> None:
        """Look at all input of the steps that are still to be done; what is wrong is raised, nothing is written.

        Documents are read last, since that takes longest.
        """
        check_place(self.recipe.run, self.root)
        merge = self.steps["merge"]
        assert isinstance(merge, Merge)
        labels = {step.label for step in steps}
        if merge.label not in labels and any(isinstance(step, Train) for step in steps):
            merge.check_layout()  # a merge that cannot be had is told before experts are trained for it
        asked: dict[str, int] = {}
        for step in steps:
            for label, length in step.asks.items():
                asked[label] = max(length, asked.get(label, 0))
        looked_at = {step.label: step for step in (*steps, *(self.steps[label] for label in asked))}
        for step in sorted(looked_at.values(), key=lambda step: isinstance(step, Reads)):
            step.check(asked.get(step.label, 0))


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with `precision: auto` as what it stands for on the device that `run` names, since it is hashed."""
    from btx.recipe.precision import automatic

    found = {}
    for name in ("train", "finetune", "dense", "evaluate"):
        section = getattr(recipe, name)
        if section is None or ("precision" not in section.model_fields_set and name in ("finetune", "dense")):
            continue  # which take it from `train`
        if section.precision == "auto":
            found[name] = section.model_copy(update={"precision": automatic(recipe.run.device)})
    return recipe.model_copy(update=found)


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
