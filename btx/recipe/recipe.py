"""The recipe: YAML composed of the steps' own settings. Unknown keys are refused, with the nearest known one.

Reading it runs nothing and opens no other file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from btx.errors import RecipeError, nearest
from btx.recipe.compare_settings import CompareSettings
from btx.recipe.fields import NAME
from btx.recipe.inputs import DomainRecipe, SeedRecipe
from btx.recipe.joint_settings import JointSettings
from btx.recipe.makers import Maker, training_of
from btx.recipe.merge_settings import MergeSettings
from btx.recipe.messages import SIGNS, sentences
from btx.recipe.settings import (
    DataSettings,
    EvaluateSettings,
    ExpertSettings,
    ExportSettings,
    FinetuneSettings,
    RunSettings,
    Settings,
    TrainSettings,
    steps_of,
)
from btx.recipe.strict_yaml import parse_yaml
from btx.recipe.task_settings import Tasks

S = TypeVar("S", bound=TrainSettings)


class Section(Settings):
    """A section of the recipe that a conversion owns: its settings, and what they require of the rest."""

    def fits(self, recipe: Recipe, name: str) -> None:
        """ValueError if it conflicts with the rest of the recipe; `name` is the section's key."""


class Recipe(Settings):
    """A whole run: BTX, the conversions beside it and the probes, whose sections are fields of a subclass."""

    conversions: ClassVar[tuple[str, ...]] = ()  # the keys of those sections
    makers: ClassVar[Mapping[str, Maker]] = {}  # the ways to make a domain's expert
    reserved: ClassVar[tuple[str, ...]] = ("seed",)  # names of models in a report, which no domain may have
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    seed: SeedRecipe
    domains: dict[str, DomainRecipe] = Field(min_length=1)
    data: DataSettings = DataSettings()
    train: ExpertSettings = ExpertSettings()
    merge: MergeSettings = MergeSettings()
    finetune: JointSettings = JointSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    probes: Settings = Settings()
    tasks: Tasks = Field(
        default_factory=dict,
        description="tasks that every model is scored on, by name: items with answers, in local files",
    )
    export: ExportSettings = ExportSettings()
    compare: CompareSettings | None = None
    run: RunSettings = RunSettings()

    @property
    def models(self) -> list[str]:
        """Names of all models that are merged, in the order of their experts."""
        return [*self.domain_of, *(["seed"] if self.merge.include_seed else [])]

    @property
    def domain_of(self) -> dict[str, str]:
        """The domain of every expert, by the expert's name, in order."""
        return {expert: name for name, domain in self.domains.items() for expert in domain.names(name)}

    @property
    def sections(self) -> dict[str, Section]:
        """The sections of the conversions besides BTX, by key; a conversion without its section does not run."""
        return {name: said for name in self.conversions if (said := getattr(self, name)) is not None}

    @property
    def probing(self) -> dict[str, Settings]:
        """The settings of the probes besides bits per byte, by name."""
        return {
            name: said for name in type(self.probes).model_fields if (said := getattr(self.probes, name)) is not None
        }

    @property
    def finetuning(self) -> JointSettings:
        """The finetuning's settings, unset optimiser fields filled from `train`."""
        return self.filled(self.finetune)

    def filled(self, section: S) -> S:
        """A section with its unset fields filled: the optimiser's from `train`, the routers' from `finetune`."""
        found = {name: getattr(self.train, name) for name in set(TrainSettings.model_fields) - section.model_fields_set}
        if isinstance(section, FinetuneSettings):
            rules = set(FinetuneSettings.model_fields) - set(TrainSettings.model_fields) - {"tokens", "mix"}
            found |= {name: getattr(self.finetune, name) for name in rules - section.model_fields_set}
        if isinstance(section, ExpertSettings) and "trainable" not in section.model_fields_set:
            found["trainable"] = self.train.trainable
        return type(section).model_validate({**dict(section), **found})

    def making(self, domain: str) -> tuple[str, Any]:
        """How a domain's expert is made, and the settings of that, unset ones filled from `train`; ValueError for what
        there is not."""
        said = self.domains[domain].expert
        [(name, settings)] = said.items() if isinstance(said, dict) else [(said, {})]
        where = f"domains.{domain}.expert"
        _refuse_unknown(where, "way", [name], [*self.makers])
        maker = self.makers[name]
        if self.domains[domain].experts > 1 and name != "train":
            raise ValueError(f"{where}: {name} makes one expert of a domain, so domains.{domain}.experts must be 1")
        if idle := [key for key in settings if key in maker.apart]:
            raise ValueError(f"{where}.{name}: {idle[0]} does not apply to one expert; domains.{domain} has its tokens")
        try:
            found = maker.section.model_validate(settings)
        except ValidationError as error:
            wrong = " ".join(sentences(error, maker.section, NAME))
            raise ValueError(f"{where}.{name}: {wrong}") from error
        if not isinstance(found, TrainSettings):
            return name, found
        found = self.filled(found)
        own = self.train.precision if found.precision == "auto" else found.precision
        return name, found.model_copy(update={"precision": own})

    @property
    def tokens_in_all(self) -> int:
        """The tokens of the experts trained here and of the finetuning together, in whole steps."""
        apart = 0
        for name, domain in self.domains.items():
            if domain.tokens and domain.checkpoint is None:
                settings = training_of(self.making(name)[1])
                apart += steps_of(domain.tokens, settings) * domain.experts * settings.batch_tokens
        return apart + steps_of(self.finetune.tokens, self.finetuning) * self.finetuning.batch_tokens

    @field_validator("domains")
    @classmethod
    def _names(cls, domains: dict[str, DomainRecipe]) -> dict[str, DomainRecipe]:
        folded: dict[str, str] = {}
        for name in domains:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"{name!r} is not a valid domain name: {SIGNS}")
            if name.lower() in cls.reserved:
                raise ValueError(f"{name!r} is the name of another model in the report; rename the domain")
            if name.lower() in folded:
                raise ValueError(f"{name!r} and {folded[name.lower()]!r} differ in case only; choose clearer names")
            folded[name.lower()] = name
        return domains

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        """Validate what spans sections: names, numbers of experts, batches."""
        self.require_domains("finetune.mix", self.finetune.mix)
        if isinstance(self.merge.copies, dict):
            _refuse_unknown("merge.copies", "model", self.merge.copies, self.models)
        for where, how in self.merge.shared.everything.items():
            _refuse_unknown(f"{where}.weights", "model", how.weights, self.models)
            if not how.counts(self.models):
                raise ValueError(f"{where}.weights: all weights are zero at some depth; give a model a positive one")
        self._enough_experts()
        self._whole_batches()
        for name, domain in self.domains.items():
            if self.makers:
                where = f"domains.{name}.expert, with what it takes from train"
                require_whole_batches(where, training_of(self.making(name)[1]))
            if domain.data and not (domain.valid or self.data.holdout):
                raise ValueError(
                    f"data.holdout is 0 and domains.{name} has no `valid` files, so there is nothing to "
                    "evaluate it on; name some, or hold a share out"
                )
        if self.evaluate.split == "select" and not self.data.select:
            raise ValueError("evaluate.split is select, and data.select holds nothing out for it; raise data.select")
        for name, section in self.sections.items():
            section.fits(self, name)
        return self

    def _enough_experts(self) -> None:
        names = [expert for name, domain in self.domains.items() for expert in domain.names(name)]
        owned = [e for m in (*names, "seed") for e in self.merge.owners([m])] if self.merge.experts != "blend" else []
        if twice := [n for one in (names, owned) for n, count in Counter(one).items() if count > 1]:
            raise ValueError(f"two experts would be called {twice[0]!r}: several of one model are numbered; rename one")
        experts = len(self.merge.owners(self.models))
        if experts < 2:
            raise ValueError(
                "a Mixture of Experts needs two experts or more; add a domain, or set merge.include_seed: true"
            )
        if (self.finetune.experts_per_token or 1) > experts:
            raise ValueError(
                f"finetune.top_k is {self.finetune.top_k}, but the merge makes {experts} experts "
                f"({', '.join(self.models)}); choose 1 to {experts}"
            )

    def _whole_batches(self) -> None:
        require_whole_batches("finetune, with what it takes from train", self.finetuning)
        if self.seed.is_builtin:
            own = self.train.model_copy(update={"batch_tokens": self.seed.builtin.batch_tokens})
            require_whole_batches("seed.builtin, with train.sequence_length", own)

    def require_domains(self, where: str, names: Iterable[str]) -> None:
        """ValueError for a name that is neither a domain's nor `seed`."""
        _refuse_unknown(where, "domain", names, [*self.domains, "seed"])

    def require_experts(self, where: str, names: Iterable[str]) -> None:
        """ValueError for a name that no expert has."""
        _refuse_unknown(where, "expert", names, [*self.domain_of])


def require_whole_batches(where: str, settings: TrainSettings) -> None:
    """ValueError unless batch_tokens is a multiple of sequence_length."""
    if settings.batch_tokens % settings.sequence_length:
        raise ValueError(
            f"{where}: batch_tokens ({settings.batch_tokens}) must be a multiple of "
            f"sequence_length ({settings.sequence_length})"
        )


def _refuse_unknown(where: str, what: str, names: Iterable[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: there is no {what} {name!r}; {nearest(name, known)}")


def read_recipe(path: Path, overrides: list[str], model: type[Recipe]) -> Recipe:
    """A recipe from a file with `a.b=value` overrides; RecipeError names every field that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}. `btx init NAME` writes one to start from.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no recipe: it must be a mapping with name, seed, domains, ...")
    for override in overrides:
        _override(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "\n".join(sentences(error, model, NAME))) from error


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text!r} is not of the form a.b=value.")
    *path, last = key.strip().split(".")
    if not all((*path, last)):
        raise RecipeError(f"--set {text!r} has an empty name in its key; write it as a.b=value.")
    place: Any = raw
    for done, part in enumerate(path, 1):
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise RecipeError(f"--set {key}: {'.'.join(path[:done])} is a value and has no keys below it.")
    place[last] = parse_yaml(value, f"--set {key}")
