"""What a step is: a frozen model whose fields are its whole recipe slice, and one folder that it publishes.

Its identity (settings, parents' keys, `version`) is hashed into the folder's name; execution is recorded, not hashed.
A value that cannot be encoded exactly raises.
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

HASHED = "hashed"  # of a step's facts, kept out of its manifest


class Step(BaseModel):
    """One stage. Subclasses say `kind`, `version`, `run`; a field that is a Step, or holds Steps, is a dependency."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    kind: ClassVar[str]
    version: ClassVar[int] = 1
    trains: ClassVar[bool] = False  # needs a process, a device and a work folder of its own

    root: Path = execution(Path("runs"))
    where: RunSettings = execution(RunSettings())
    name: str | None = execution(None)

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Fill `out` (private, empty); `work` keeps state between attempts. Returns facts for the manifest.

        SHA-256 of files that were hashed as they were written may be among the facts, by name under `HASHED`.
        """
        raise NotImplementedError

    @property
    def needs(self) -> int:
        """Bytes of memory that it takes at once, by estimate, once its parents are there; 0 where it is little."""
        return 0

    @property
    def asks(self) -> dict[str, int]:
        """By the label of a parent, how many tokens of text it must have at least for this step."""
        return {}

    def check(self, asked: int) -> None:
        """Raise what is wrong with its own input, before anything is written; `asked` is the most that children ask."""

    @property
    def label(self) -> str:
        """How people and the command call it: kind, or kind:name."""
        return f"{self.kind}:{self.name}" if self.name else self.kind

    @cached_property
    def key(self) -> str:
        """SHA-256 of the identity."""
        return fingerprint(self.identity())

    @property
    def folder(self) -> Path:
        """Where it publishes: by kind and key, so that what two labels need is made once."""
        return self.root / "steps" / f"{self.kind}-{self.key[:12]}"

    @property
    def short(self) -> Path:
        """The link to its folder by its label, such as runs/demo/train-math or runs/demo/export."""
        return self.root / self.label.replace(":", "-")

    @property
    def work(self) -> Path:
        """Where an unfinished training keeps its saved states, which go once it has published."""
        return self.root / "work" / self.folder.name

    @property
    def lock_file(self) -> Path:
        """Held by the process that is at work on it."""
        return self.work.with_name(f"{self.work.name}.lock")  # with_suffix would take math.0 for math

    @property
    def log_file(self) -> Path:
        """What a training in a process of its own prints."""
        return self.work.with_name(f"{self.work.name}.log")

    @property
    def job_file(self) -> Path:
        """What a process of its own is given to build it by."""
        return self.work.with_name(f"{self.work.name}.job.json")

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result."""
        fields = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if not (isinstance(extra, dict) and extra.get("execution")):
                fields[name] = _encode(getattr(self, name))
        return {"kind": self.kind, "version": self.version, **fields}

    @property
    def parents(self) -> dict[str, Step]:
        """Direct dependencies by label."""
        return {s.label: s for name in type(self).model_fields for s in _steps(getattr(self, name))}

    @property
    def done(self) -> bool:
        """Whether its folder is published and was made from the parents that are there now."""
        if not is_published(self.folder):
            return False
        manifest = read_manifest(self.folder)
        if "inputs" not in manifest:  # of a btx that knew parents by label alone
            return all(manifest["parents"].get(k) == p.digest for k, p in self.parents.items() if p.exists)
        return all(manifest["inputs"].get(p.key) == p.digest for p in self.parents.values() if p.exists)

    @property
    def exists(self) -> bool:
        """Whether there is a folder to read at all."""
        return is_published(self.folder)

    @property
    def digest(self) -> str:
        """SHA-256 of what it published."""
        return str(read_manifest(self.folder)["digest"])

    def build(self, emit: Emit, *, rank: int = 0) -> None:
        """Run and publish, unless it is done; one process does it while others wait, and find it done.

        `rank` is this process's in a distributed training. Whoever starts the process passes it; RANK in the
        environment is not trusted, since Kubernetes and others set it for reasons of their own.
        """
        if rank:
            self._help()
            return

        def waiting(owner: str) -> None:
            emit(Waiting(self.label, f"waits for {owner}, which is at work on it"))

        with lock(self.lock_file, waiting=waiting):
            if self.done:
                return
            if self.exists:
                raise ArtifactError(
                    f"{self.folder} was made from other inputs than those there now. "
                    "Remove it and run the same command again."
                )
            self._attempt(emit)

    def _help(self) -> None:
        """As a further process of a distributed training: compute with the first one, which alone publishes.

        The first one may have to wait for the lock, and find the step done by others: then there is nothing to help.
        """
        while True:
            held = held_by_launch(self.lock_file)
            if self.done:  # asked after the lock: who holds it finds the same, and needs no help
                return
            if held:
                break
            time.sleep(0.5)
        with tempfile.TemporaryDirectory() as scratch:
            self.run(Path(scratch), self.work, lambda _event: None)

    def _attempt(self, emit: Emit) -> None:
        started = time.time()
        for parent in self.parents.values():
            if parent.folder.parent == self.folder.parent:  # what we published; a given checkpoint is hashed by itself
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
    """Those of some steps, parents first, that are not done, or rest on a folder that is there but not done."""
    stale: set[str] = set()
    for step in steps:
        if not step.done or any(p.exists and label in stale for label, p in step.parents.items()):
            stale.add(step.label)
    return [step for step in steps if step.label in stale]


def _steps(value: Any) -> Iterator[Step]:
    if isinstance(value, Step):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
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
    """What of this process may change a result within rounding, versions aside; nothing where torch had no part."""
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
    """In what a published step's environment is another than this one's, as `there, here`: its folder is used still."""
    there = {**manifest.get("environment", {}), **manifest["versions"]}
    here = {**environment(where), **versions()}
    return [f"{name} {there[name]}, here {here[name]}" for name in ("device", "instructions", "torch", "transformers")
            if name in there and name in here and there[name] != here[name]]  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what takes part in a result."""
    found = {"btx": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "accelerate", "mergekit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
