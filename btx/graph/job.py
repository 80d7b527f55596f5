"""The job file: the frozen specification of one step, from which a worker rebuilds it without reading the recipe.

It holds every ancestor step once. The worker finds classes by name in its own registry, never by an import path from
the file, and refuses a step whose key differs from the planned one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from btx.errors import ArtifactError
from btx.graph.artifact import write_json
from btx.graph.step import Step

STEP = "$step"  # stands for a parent, by its place in the file


def freeze(step: Step, *, threads: int | None = None) -> Path:
    """Write a step's job file; returns its path. `threads` are the CPU threads allotted to the job."""
    steps: dict[str, dict[str, Any]] = {}
    said = _add(step, steps)
    if threads is not None:
        steps[said]["fields"]["where"]["threads"] = threads
    step.job_file.parent.mkdir(parents=True, exist_ok=True)
    fresh = step.job_file.with_name(f".{step.job_file.name}")
    write_json(fresh, {"label": step.label, "key": step.key, "step": said, "steps": steps})
    fresh.replace(step.job_file)
    return step.job_file


def thaw(file: Path, classes: Mapping[str, type[Step]]) -> Step:
    """The step of a job file; ArtifactError if it cannot be rebuilt, or its key differs from the planned one."""
    try:
        job = json.loads(file.read_text(encoding="utf-8"))
        built: dict[str, Step] = {}
        for place, about in job["steps"].items():  # parents first
            fields = {name: _thawed(value, built) for name, value in about["fields"].items()}
            built[place] = classes[about["class"]].model_validate(fields)
        step = built[job["step"]]
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactError(f"{file} is not a job of this btx ({error!r:.200}). Run the same command again.") from error
    if step.key != job["key"]:
        raise ArtifactError(
            f"{file}: {step.label} differs from the step that was planned (key {step.key[:12]}, not "
            f"{str(job['key'])[:12]}): the file was changed, or btx was. Run the same command again."
        )
    return step


def _add(step: Step, steps: dict[str, dict[str, Any]]) -> str:
    place = f"{step.label}@{step.key}"
    if place not in steps:
        fields = {name: _frozen(getattr(step, name), steps) for name in type(step).model_fields}
        steps[place] = {"class": type(step).__name__, "fields": fields}
    return place


def _frozen(value: Any, steps: dict[str, dict[str, Any]]) -> Any:
    if isinstance(value, Step):
        return {STEP: _add(value, steps)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)  # validators ask which fields are set
    if isinstance(value, dict):
        return {key: _frozen(item, steps) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_frozen(item, steps) for item in value]
    return str(value) if isinstance(value, Path) else value


def _thawed(value: Any, built: dict[str, Step]) -> Any:
    if isinstance(value, dict):
        return built[value[STEP]] if value.keys() == {STEP} else {k: _thawed(v, built) for k, v in value.items()}
    return [_thawed(item, built) for item in value] if isinstance(value, list) else value
