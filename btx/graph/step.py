"""A step: a frozen model whose fields are its slice of the recipe, and which publishes one folder.

Its identity (settings, parents' keys, `version`) is hashed into the folder's name; execution settings are recorded, not
hashed. A value that cannot be encoded exactly raises TypeError.
"""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from btx import __version__
from btx.errors import ArtifactError
from btx.events import Emit, Note, Waiting
from btx.graph.artifact import (
    STATES,
    fingerprint,
    held_by_launch,
    is_published,
    lock,
    publish,
    read_manifest,
    verify_once,
)
from btx.graph.cost import cost_of, forget_peak
from btx.recipe.fields import execution
from btx.recipe.settings import RunSettings, Settings

HASHED = "hashed"  # a key of a step's facts that is kept out of its manifest


class Step(BaseModel):
    """One stage. Subclasses define `kind`, `version`, `run`; a field that is or holds a Step is a dependency."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    kind: ClassVar[str]
    version: ClassVar[int] = 1
    trains: ClassVar[bool] = False  # needs a process, a device and a work folder of its own

    root: Path = execution(Path("runs"))
    where: RunSettings = execution(RunSettings())
    name: str | None = execution(None)

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Fill `out` (private, empty); `work` keeps state between attempts. Returns facts for the manifest.

        Under `HASHED` the facts may hold the SHA-256 of files that were hashed while written, by name.
        """
        raise NotImplementedError

    @property
    def needs(self) -> int:
        """Estimated peak memory in bytes, once its parents are done; 0 if it is small."""
        return 0

    @property
    def asks(self) -> dict[str, int]:
        """The least number of training tokens that this step needs of each parent, by the parent's label."""
        return {}

    def check(self, asked: int) -> None:
        """Raise for bad input, before anything is written; `asked` is the most tokens that a child needs of it."""

    @property
    def label(self) -> str:
        """Its name for people and on the command line: kind, or kind:name."""
        return f"{self.kind}:{self.name}" if self.name else self.kind

    @cached_property
    def key(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity())

    @property
    def folder(self) -> Path:
        """The folder it publishes, named by kind and key, so that a result needed under two labels is made once."""
        return self.root / "steps" / f"{self.kind}-{self.key[:12]}"

    @property
    def short(self) -> Path:
        """The link to its folder by its label, such as runs/demo/train-math or runs/demo/export."""
        return self.root / self.label.replace(":", "-")

    @property
    def work(self) -> Path:
        """Where an unfinished step keeps its saved states, which are removed once it has published."""
        return self.root / "work" / self.folder.name

    @property
    def lock_file(self) -> Path:
        """The lock file, held by the process that builds the step."""
        return self.work.with_name(f"{self.work.name}.lock")  # with_suffix would take math.0 for math

    @property
    def log_file(self) -> Path:
        """The log of the step's job."""
        return self.work.with_name(f"{self.work.name}.log")

    @property
    def job_file(self) -> Path:
        """The job file that a worker builds the step from."""
        return self.work.with_name(f"{self.work.name}.job.json")

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result."""
        fields = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            unused = extra.get("later") and getattr(self, name) == info.default
            if not (extra.get("execution") or unused):
                fields[name] = _encode(getattr(self, name))
        return {"kind": self.kind, "version": self.version, **fields}

    @property
    def parents(self) -> dict[str, Step]:
        """Direct dependencies by label."""
        return {s.label: s for name in type(self).model_fields for s in _steps(getattr(self, name))}

    @property
    def done(self) -> bool:
        """Whether its folder is published and was made from the current parents."""
        if not is_published(self.folder):
            return False
        manifest = read_manifest(self.folder)
        if "inputs" not in manifest:  # by an older btx, which recorded parents by label only
            return all(manifest["parents"].get(k) == p.digest for k, p in self.parents.items() if p.exists)
        return all(manifest["inputs"].get(p.key) == p.digest for p in self.parents.values() if p.exists)

    @property
    def exists(self) -> bool:
        """Whether its folder is published, whatever its parents."""
        return is_published(self.folder)

    @property
    def digest(self) -> str:
        """SHA-256 of what it published."""
        return str(read_manifest(self.folder)["digest"])

    def build(self, emit: Emit, *, rank: int = 0) -> None:
        """Run and publish, unless it is done; one process does it while others wait, then find it done.

        `rank` is this process's rank in a distributed training. Whoever starts the process passes it; RANK in the
        environment is not trusted, since Kubernetes and others set it for their own purposes.
        """
        if rank:
            self._help()
            return

        def waiting(owner: str) -> None:
            emit(Waiting(self.label, f"waits for {owner}, which is building it"))

        with lock(self.lock_file, waiting=waiting):
            if self.done:
                return
            if self.exists:
                raise ArtifactError(
                    f"{self.folder} was made from other inputs than the current ones. "
                    "Remove it and run the same command again."
                )
            self._attempt(emit)

    def _help(self) -> None:
        """Take part in a distributed training at a rank above 0; rank 0 alone publishes.

        Rank 0 may have to wait for the lock, and then find the step done by others: then there is nothing to do here.
        """
        while True:
            held = held_by_launch(self.lock_file)
            if self.done:  # checked after the lock: its holder finds the same, and needs no help
                return
            if held:
                break
            time.sleep(0.5)
        with tempfile.TemporaryDirectory() as scratch:
            self.run(Path(scratch), self.work, lambda _event: None)

    def _attempt(self, emit: Emit) -> None:
        started = time.time()
        for parent in self.parents.values():
            if parent.folder.parent == self.folder.parent:  # not for external checkpoints, which are hashed elsewhere
                verify_once(parent.folder)
        manifest: dict[str, Any] = {
            "step": self.label,
            "key": self.key,
            "identity": self.identity(),
            "parents": {k: p.digest for k, p in self.parents.items()},  # for people
            "inputs": {p.key: p.digest for p in self.parents.values()},  # by key: another label may need this folder
            "execution": self.where.model_dump(mode="json"),
            "versions": versions(),
        }

        def produce(out: Path) -> dict[str, str]:
            forget_peak()
            facts = self.run(out, self.work, emit)
            hashed: dict[str, str] = facts.pop(HASHED, {})
            manifest["facts"] = facts
            manifest["environment"] = environment(self.where)
            manifest["cost"] = cost_of(facts, seconds=time.time() - started, folder=out).written()
            manifest["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            return hashed

        publish(self.folder, produce, manifest)
        shutil.rmtree(self.work / STATES, ignore_errors=True)
        emit(Note(self.label, f"done in {manifest['cost']['wall_seconds']} s"))


def undone(steps: list[Step]) -> list[Step]:
    """The steps (given parents first) that are not done, or depend on a published step that is not done."""
    stale: set[str] = set()
    for step in steps:
        if not step.done or any(p.exists and p.key in stale for p in step.parents.values()):
            stale.add(step.key)
    return [step for step in steps if step.key in stale]


def _steps(value: Any) -> Iterator[Step]:
    if isinstance(value, Step):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _steps(item)


def _encode(value: Any) -> Any:
    if isinstance(value, Step):
        return value.key
    if isinstance(value, Settings):
        return value.identity()
    if isinstance(value, dict):
        return [[k, _encode(v)] for k, v in value.items()]  # order counts: it is the order of the experts
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a step's identity cannot hold {value!r} exactly")


def environment(where: RunSettings) -> dict[str, Any]:
    """What of this process may change a result within rounding, besides versions; empty if torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    on_gpu = where.device != "cpu" and torch.cuda.is_available()
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": torch.distributed.get_world_size() if several else 1,
    }


def elsewhere(manifest: dict[str, Any], where: RunSettings) -> list[str]:
    """How a published step's environment differs from this one, as `there, here`; its folder is used anyway."""
    there = {**manifest.get("environment", {}), **manifest["versions"]}
    here = {**environment(where), **versions()}
    return [f"{name} {there[name]}, here {here[name]}" for name in ("device", "instructions", "torch", "transformers")
            if name in there and name in here and there[name] != here[name]]  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of the packages that take part in a result."""
    found = {"btx": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "accelerate", "mergekit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
