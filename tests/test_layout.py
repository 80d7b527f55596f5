"""The architecture: which room may import which, where files lie, their length, and that documents name what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BTX = sorted((ROOT / "btx").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ROOMS = re.findall(r"^\| `(\w+)` \|", PAGE, re.M)  # from the highest down


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


def module_of(path: Path) -> str:
    """The full name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_room_has_its_line_on_the_page() -> None:
    found = {path.relative_to(ROOT / "btx").parts[0].removesuffix(".py") for path in BTX}
    assert found - {"__init__", "__main__"} == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("path", BTX, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_those_below(path: Path) -> None:
    own = path.relative_to(ROOT / "btx").parts[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        room = parts[1] if len(parts) > 1 and parts[0] == "btx" else ""
        if room not in ROOMS or room == own or own == "__main__":
            continue
        assert own in ROOMS, f"{own} imports {name}"
        assert ROOMS.index(room) > ROOMS.index(own), f"{own} imports {name}, which is above it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {module_of(path): path for path in BTX}
    below = {name: imports(path) & modules.keys() - {name, "btx"} for name, path in modules.items()}
    while leaves := {name for name, others in below.items() if not others}:
        below = {name: others - leaves for name, others in below.items() if name not in leaves}
    assert not below, f"circles among {sorted(below)}"


def test_every_path_and_room_that_the_page_names_is_there() -> None:
    for name in re.findall(r"`((?:btx|kernels|tests|docs)/[\w./]*)`", PAGE):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / name).exists(), name


def test_only_experts_imports_the_kernels() -> None:
    users = [p.name for p in BTX if any(n.split(".")[0] == "btx_kernels" for n in imports(p))]
    assert users == ["kernels.py"]


def test_kernels_import_neither_btx_nor_transformers() -> None:
    for path in KERNELS:
        assert not {n.split(".")[0] for n in imports(path)} & {"btx", "transformers"}, path


def test_engines_know_command_lines_not_steps() -> None:
    for path in (ROOT / "btx" / "engines").glob("*.py"):
        known = {n for n in imports(path) if n.startswith("btx.")}
        assert all(name.startswith(("btx.signals", "btx.events", "btx.engines")) for name in known)


def test_the_kernels_folder_is_no_package() -> None:
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "tests" / "kernels").exists()


def test_no_file_maps_safetensors_of_models() -> None:
    mapping = {"safe_open", "load_file", "load_model"}
    users = {
        path.relative_to(ROOT).as_posix() for path in BTX
        if any(name.startswith("safetensors") and name.split(".")[-1] in mapping for name in imports(path))
    }  # fmt: skip
    # Neither has models: btx/checkpoints/reader.py reads blocks of those files itself.
    assert users == {"btx/training/state.py", "btx/training/moments.py"}


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


def test_the_readme_opens_with_the_two_commands_and_its_links_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "docs/guide.md", "pipelines/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
            assert ((ROOT / page).parent / name).exists(), f"{page} names {name}, which is not there"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("make run") < text.index("make test") < 1500


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_import_no_other_tests(path: Path) -> None:
    """Shared helpers belong in tests/support."""
    others = {name for name in imports(path) if name.startswith("tests.") and ".test_" in name}
    assert not others
