"""Every setting of a recipe belongs to one of three classes; settings.txt states which, and the steps it re-keys first.

The table is generated from the recipe's own model, so a missing setting fails the test. To regenerate it:
`python -m tests.unit.test_settings_table` in the project's root.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from btx.cli.main import graph_of
from btx.conversions.registry import recipe_model
from tests.support.world import World, write_jsonl

TABLE = Path(__file__).with_name("settings.txt")
VALUES: dict[str, Any] = {  # by path or last name, where a value derived from the type alone would not be valid
    "name": "other", "data.directory": ".", "data.date": "2026-01-31", "evaluate.sequence_length": 8,
    "seed.builtin.hidden_size": 64, "seed.builtin.heads": 2, "export.shard_bytes": 9999, "merge.shared": "linear",
    "merge.shared_expert": None, "merge.layers": None, "merge.experts": "split", "merge.router": "orthogonal",
    "merge.copies": 2, "run.threads": 3, "run.launch": "x.yaml", "run.engine": "local",
    "batch_tokens": 64, "sequence_length": 8, "precision": "bf16", "mix": {"math": 1.0, "law": 2.0},
    "soft_first_layer": True, "experts": 4, "top_k": 1, "scratch.shape": "dense",
    "probes.formats.formats": {"x": "y"}, "proxy.base": "law", "proxy.antiexpert": "law",
    "proxy.weights": {"math": 0.5}, "reft.layers": [0], "method": "dora", "options": {"r": 4},
    "sft.controls": ["shuffled"], "sft.control": "delusive", "grpo.mark_every": 6, "grpo.sequence_length": 600,
    "grpo.confidence": "s: (.)", "grpo.formats": {"x": "y"}, "grpo.bands": ["easy"],
    "grpo.variants": {"held": {"kl": 0.5}},
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {  # likewise, what must be set with it
    "soft_first_layer": {"{}.routing": "sample_top1"},
    "merge.chunks": {"merge.experts": "split"},
    "grpo.bands": {"grpo.mark_every": 5, "grpo.bands": ["hard"]},
    "grpo.mark_every": {"grpo.mark_every": 5, "grpo.bands": ["hard"]},
    "merge.router_tokens": {"merge.router": "activations"},
    "reft.positions": {"data.loss_mask": "completion"},
    "prefix": {"{}.positions": "prompt", "data.loss_mask": "completion"},
    "suffix": {"{}.positions": "prompt", "data.loss_mask": "completion"},
}
SKIPPED = {  # names of files, whose contents count; and layouts that other tests cover
    "seed.checkpoint", "seed.data", "seed.valid", "seed.tokens", "seed.architecture", "domains", "merge.shared",
    "merge.layers", "merge.shared_expert", "compare", "tasks", "sft.data", "grpo.task",
    "grpo.passrate",
}  # fmt: skip


SECTIONS: dict[str, Any] = {  # that need something
    "sft": {"data": ["data/items.jsonl"], "controls": ["empty"]},
    "grpo": {"task": {"file": "builtin:arithmetic", "kind": "exact_match"}},
}


def leaves(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting below a model by its path, optional sections included."""
    for name, field in model.model_fields.items():
        where = f"{path}.{name}" if path else name
        inner = next((t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if inner and where not in SKIPPED:
            yield from leaves(inner, where)
        elif where not in SKIPPED:
            yield where, field


def _types(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [t for part in get_args(annotation) for t in _types(part)]
    return [annotation]


def other(field: Any) -> Any:
    """A value of the field's type that is not its default."""
    was = field.get_default(call_default_factory=True)
    for kind in _types(field.annotation):
        if get_origin(kind) is Literal:
            return next(value for value in get_args(kind) if value != was)
        if kind is bool:
            return not was
        if kind is int:
            return (was if isinstance(was, int) else 0) + 1
        if kind is float:
            return was / 2 if isinstance(was, float) and was else 0.25
        if kind is str:
            return "x"
        if get_origin(kind) is list:
            return ["x"]
        if get_origin(kind) is tuple:
            return [0.5, 0.5]
    raise AssertionError(f"no value is known for {field}")


def world_of(root: Path) -> World:
    """A world with every section, and two experts with data, so that routers can be initialised from it."""
    world = World(root)
    for section in recipe_model().conversions:
        world.set(section, SECTIONS.get(section, {}))
    write_jsonl(root / "data" / "items.jsonl", [{"instruction": "Say it.", "output": "yes", "labels": ["yes", "no"]}])
    world.set("scratch.shape", "moe")  # else its routing decides nothing
    for section in ("train", "evaluate"):  # `auto` depends on the machine
        world.set(f"{section}.precision", "fp32")
    world.set("probes", {name: {} for name in recipe_model().model_fields["probes"].annotation.model_fields})  # type: ignore[union-attr]
    return world


def builtin_of(root: Path) -> World:
    """The same with a builtin seed."""
    world = world_of(root)
    world.set("seed", {"checkpoint": "builtin", "data": ["data/math.jsonl"], "builtin": {}})
    world.set("domains", {name: {"data": [f"data/{name}.jsonl"], "tokens": 64} for name in ("math", "law")})
    return world


def first_changed(world: World, path: str, field: Any) -> list[str]:
    """Kinds of the steps that a setting re-keys without re-keying their parents."""
    recipe, world.recipe = world.recipe, _copied(world.recipe)
    try:
        section, _, last = path.rpartition(".")
        for key, value in BESIDE.get(path, BESIDE.get(last, {})).items():
            world.set(key.format(section), value)
        before = graph_of(world.write(), ()).steps
        world.set(path, VALUES[path] if path in VALUES else VALUES[last] if last in VALUES else other(field))
        after = graph_of(world.write(), ()).steps
    finally:
        world.recipe = recipe
    changed = {label for label, step in after.items() if label not in before or before[label].key != step.key}
    first = [label for label in changed if not changed & after[label].parents.keys()]
    return sorted({after[label].kind for label in first})


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def table(root: Path) -> list[str]:
    """A line per setting: its path, its class, and what it re-keys first."""
    plain, builtin = world_of(root / "plain"), builtin_of(root / "builtin")
    rows = []
    for path, field in leaves(recipe_model()):
        changed = first_changed(builtin if path.startswith("seed.builtin") else plain, path, field)
        marks = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        kind = "environment" if marks.get("environment") else "neither" if marks.get("execution") else "identity"
        rows.append(f"{path:34}{kind:13}{', '.join(changed)}".rstrip())
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The table as it is."""
    return table(tmp_path_factory.mktemp("table"))


def test_the_table_is_that_of_the_settings(rows: list[str]) -> None:
    assert rows == TABLE.read_text(encoding="utf-8").splitlines(), "see the head of this file"


def test_what_is_marked_re_keys_nothing_and_all_else_something(rows: list[str]) -> None:
    for row in rows:
        _, kind, *changed = row.split(maxsplit=2)
        assert bool(changed) == (kind == "identity"), row


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("plain", "builtin"):
            (Path(scratch) / name).mkdir()
        sys.stdout.write("\n".join(table(Path(scratch))) + "\n")
