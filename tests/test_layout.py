"""The house: who may import whom, where files lie, how long they are, and that the README's tree is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BTX = sorted((ROOT / "btx").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Lower floors never import upward; a module may import those of its own floor and of the floors below.
FLOORS = (
    {"cli", "__main__"},
    {"launch", "command", "show", "doctor", "template", "bench", "plan", "moe"},
    {"pipeline", "texts", "walk", "checks", "recipe", "mixing"},
    {"steps", "card"},
    {"step", "pictures", "proof"},
    {"probes", "model"},
    {
        "loop",
        "loss",
        "schedule",
        "gguf",
        "cast_once",
        "state",
        "metrics",
        "stream",
        "tokens",
        "split",
        "chat",
        "paths",
        "documents",
        "encoder",
        "heldout",
        "token_map",
        "corpus",
        "readers",
        "merge",
        "shards",
        "portable",
        "routed",
        "balance",
        "experts",
    },
    {
        "builtin",
        "arithmetic",
        "checkpoint",
        "safety",
        "layouts",
        "families",
        "target",
        "native",
        "routing",
        "precision",
        "fields",
        "messages",
        "artifact",
        "settings",
        "digests",
        "flops",
        "signals",
        "strict_yaml",
        "progress",
        "engines",
    },
    {"errors", "terminal", "__init__", ""},
)


def floor(module: str) -> int:
    """Index of a top-level module of btx, 0 the highest."""
    found = [n for n, names in enumerate(FLOORS) if module in names]
    assert found, f"btx.{module} has no floor: say in tests/test_layout.py where it belongs"
    return found[0]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", BTX, ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_floors_never_import_upward(path: Path) -> None:
    own = path.relative_to(ROOT / "btx").parts[0].removesuffix(".py")
    for name in imports(path):
        if name.split(".")[0] == "btx":
            other = name.split(".")[1] if "." in name else ""
            if not (ROOT / "btx" / other).exists() and not (ROOT / "btx" / f"{other}.py").exists():
                continue  # a name of btx/__init__.py
            assert floor(other) >= floor(own), f"{own} imports btx.{other}"


def test_only_experts_imports_the_kernels() -> None:
    users = [p.name for p in BTX if any(n.split(".")[0] == "btx_kernels" for n in imports(p))]
    assert users == ["experts.py"]


def test_kernels_import_neither_btx_nor_transformers() -> None:
    for path in KERNELS:
        assert not {n.split(".")[0] for n in imports(path)} & {"btx", "transformers"}, path


def test_engines_know_command_lines_not_steps() -> None:
    for path in (ROOT / "btx" / "engines").glob("*.py"):
        assert {n for n in imports(path) if n.startswith("btx.")} <= {"btx.signals", "btx.signals.Stop"}


def test_the_kernels_folder_is_no_package() -> None:
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "tests" / "kernels").exists()


def test_no_file_maps_safetensors_of_models() -> None:
    users = {p.relative_to(ROOT).as_posix() for p in BTX if any(n.split(".")[0] == "safetensors" for n in imports(p))}
    assert users == {"btx/training/state.py"}  # of models, btx/checkpoints/reader.py reads blocks of the file itself


@pytest.mark.parametrize("path", [*BTX, *KERNELS, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_why_they_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", [*BTX, *KERNELS], ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_public_ones_have_docstrings(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            nested = node.col_offset > 4 or (isinstance(node, ast.FunctionDef) and node.col_offset == 4)
            assert nested or ast.get_docstring(node), node.name


def test_the_readme_opens_with_the_two_commands_and_its_tree_is_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("make run") < text.index("make test") < 1500
    block = re.search(r"```\n(README\.md.+?)```", text, re.S)
    assert block
    for line in block[1].splitlines():
        name = line.split("  ")[0].strip()
        if name:
            matches = [p for p in ROOT.rglob(name.rstrip("/")) if ".venv" not in p.parts]
            assert matches, f"the README's tree names {name}, which is not there"
    for path in BTX:
        parts = path.relative_to(ROOT / "btx").parts
        if len(parts) == 1 and not path.name.startswith("__"):
            assert path.name in block[1], f"the README's tree does not name {path.name}"
