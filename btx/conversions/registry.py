"""The registry of conversions and step classes, and the recipe model composed of their sections.

The listing of a folder is the registry. So a conversion is one file, and its section of the recipe is validated,
documented in the schema and its errors reported like any other.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import Field, create_model

import btx.conversions
import btx.steps
from btx.conversions.contract import Conversion
from btx.conversions.experts import TRAIN
from btx.errors import ArtifactError, nearest
from btx.graph.step import Step
from btx.models.composed import FILE, described
from btx.models.opened import Opened, opened_checkpoint
from btx.probes.registry import ALWAYS, probes
from btx.recipe.recipe import Recipe, read_recipe
from btx.recipe.settings import RunSettings, Settings
from btx.steps.model import ComposedStep

PROBES = "Probes that measure every model besides bits per byte, each with its own settings; {} takes its defaults."


@cache
def conversions() -> dict[str, Conversion]:
    """All conversions by module name; those without a section, which always run, come first."""
    found = {
        module.__name__.rpartition(".")[2]: module.CONVERSION
        for module in _modules(btx.conversions)
        if hasattr(module, "CONVERSION")
    }
    return dict(sorted(found.items(), key=lambda one: one[1].section is not None))


@cache
def recipe_model() -> type[Recipe]:
    """The recipe with the section of every conversion that has one."""
    owned = {name: found.section for name, found in conversions().items() if found.section}
    probing = _optional({name: probe.settings for name, probe in probes().items() if name != ALWAYS})
    further = create_model("ProbesRecipe", __base__=Settings, __doc__=PROBES, **probing)
    fields: dict[str, Any] = {**_optional(owned), "probes": (further, further())}
    made = create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, **fields)
    made.conversions = tuple(owned)
    made.makers = {"train": TRAIN, **{name: found.maker for name, found in conversions().items() if found.maker}}
    made.reserved = ("seed", *(model for found in conversions().values() for model in found.models))
    return made


def _optional(sections: Mapping[str, type[Settings]]) -> dict[str, Any]:
    """Optional fields, each with the docstring of its class as description."""
    return {name: (section | None, Field(None, description=section.__doc__)) for name, section in sections.items()}


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """A recipe from a file with `a.b=value` overrides; RecipeError names every field that is wrong."""
    return read_recipe(path, overrides, recipe_model())


def schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe_model().model_json_schema()}


def classes() -> dict[str, type[Step]]:
    """Every step class, by name."""
    for room in (btx.steps, btx.conversions):
        list(_modules(room))
    return {cls.__name__: cls for cls in _below(Step) if cls.__module__.startswith("btx.")}


def _modules(room: ModuleType) -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(room.__path__):
        yield importlib.import_module(f"{room.__name__}.{module.name}")


def _below(cls: type[Step]) -> Iterator[type[Step]]:
    for one in cls.__subclasses__():
        yield one
        yield from _below(one)


@contextmanager
def open_model(folder: Path, *, where: RunSettings, dtype: torch.dtype = torch.float32) -> Iterator[Opened]:
    """Open a published model from its folder alone: a checkpoint, or a composed model with its parts."""
    if not (folder / FILE).is_file():
        with opened_checkpoint(folder, where=where, dtype=dtype) as found:
            yield found
        return
    kind, parts, said = described(folder)
    kinds = {cls.kind: cls for cls in classes().values() if issubclass(cls, ComposedStep) and cls is not ComposedStep}
    if kind not in kinds:
        raise ArtifactError(f"{folder / FILE} is of a kind that this btx does not know: {kind}; {nearest(kind, kinds)}")
    settings = kinds[kind].model_fields["settings"].annotation
    assert isinstance(settings, type)
    assert issubclass(settings, Settings)
    with ExitStack() as stack:
        opened = {n: stack.enter_context(open_model(path, where=where, dtype=dtype)) for n, path in parts.items()}
        yield kinds[kind].compose(folder, settings.model_validate(said), opened)
