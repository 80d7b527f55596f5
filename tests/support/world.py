"""A valid recipe at pico size, to be broken in one place, and how that must be refused.

The real command refuses bad input before anything is written: an exit code, a sentence, no run folder.
"""

from __future__ import annotations

import atexit
import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import yaml
from click.testing import CliRunner

from btx.cli.main import graph_of, main
from tests.support.models import config_of, save_model

Break = Callable[["World"], Any]


class World:
    """A folder with seed, an expert trained elsewhere, data and a recipe that names them all."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for part in _good().iterdir():
            shutil.copytree(part, root / part.name)
        self.runs = root / "runs"
        self.recipe: Any = {
            "name": "r",
            "seed": {"checkpoint": "seed"},
            "domains": {
                "math": {"data": ["data/math.jsonl"], "tokens": 64},
                "law": {"checkpoint": "law", "data": ["data/law.jsonl"]},
            },
            "train": {"sequence_length": 16, "batch_tokens": 32, "precision": "fp32"},  # auto differs by processor
            "evaluate": {"precision": "fp32"},
            "finetune": {"tokens": 64},
            "run": {"directory": str(self.runs), "device": "cpu"},
        }

    @property
    def seed(self) -> Path:
        """The seed's folder."""
        return self.root / "seed"

    @property
    def law(self) -> Path:
        """The folder of the expert that was trained elsewhere."""
        return self.root / "law"

    @property
    def math(self) -> Path:
        """The documents of the domain math."""
        return self.root / "data" / "math.jsonl"

    def set(self, key: str, value: Any) -> None:
        """Change the recipe at a dotted path."""
        *path, last = key.split(".")
        place = self.recipe
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value

    def write(self) -> Path:
        """The recipe as a file."""
        path = self.root / "r.yaml"
        path.write_text(yaml.safe_dump(self.recipe, sort_keys=False), encoding="utf-8")
        return path

    def examine(self) -> None:
        """Run all checks that `btx run` makes before it writes."""
        graph = graph_of(self.write(), ())
        graph.check(graph.needed(graph.labels("report")))

    def key(self, label: str) -> str:
        """The key of a step of the graph."""
        return graph_of(self.write(), ()).steps[label].key


@cache
def _good() -> Path:
    root = Path(mkdtemp(prefix="btx-faults-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    save_model(root / "seed", config_of("llama"))
    save_model(root / "law", config_of("llama"), noise=0.01)
    (root / "data").mkdir()
    for name in ("math", "law"):
        rows = [{"text": f"{name} {n} is a number of some kind, not so small"} for n in range(40)]
        write_jsonl(root / "data" / f"{name}.jsonl", rows)
    return root


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), encoding="utf-8")


def refused(recipe: Path, runs: Path, code: int, words: Iterable[str], *options: str) -> str:
    """Assert that `btx run` exits with this code and one sentence with these words, and writes nothing."""
    before = sorted(p for p in recipe.parent.rglob("*"))
    with patch("btx.graph.scheduler.run_steps", side_effect=AssertionError("the input was accepted")):
        result = CliRunner().invoke(main, ["run", str(recipe), *options])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert isinstance(result.exception, SystemExit)
    assert result.output.startswith("btx: ")
    assert result.output.rstrip().endswith((".", "?"))
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert not runs.exists()
    assert sorted(p for p in recipe.parent.rglob("*")) == before
    return result.output


def setting(key: str, value: Any) -> Break:
    """Break the recipe at one key."""
    return lambda world: world.set(key, value)
