"""Checkpoint folders as found in practice: hub caches, pointers, shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from btx.cli.main import main

Change = Callable[[Path], Any]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"


def into_cache(folder: Path, cache: Path) -> Path:
    """Lay the folder out as the hub's cache does: blobs, and a snapshot of links to them; returns the entry's root."""
    root, snapshot = cache, cache / "snapshots" / ("a" * 40)
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder)
        blob = root / "blobs" / f"sha-of-{str(name).replace('/', '-')}"
        shutil.copy(file, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(Path("../" * (2 + len(name.parts) - 1)) / "blobs" / blob.name)
    return root


def put(name: str, text: str = "{}", *, gone: str = "") -> Change:
    """Write a file, and remove another."""

    def do(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        if gone:
            (folder / gone).unlink()

    return do


def check(folder: Path, code: int = 0) -> str:
    """`btx check`."""
    result = CliRunner().invoke(main, ["check", str(folder)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def snapshot(folder: Path, out: Path) -> Path:
    """The model as a snapshot of the hub's cache."""
    return into_cache(folder, out / "models--org--name") / "snapshots" / ("a" * 40)


WEIGHTS = "model.safetensors"


INDEX = "model.safetensors.index.json"


def sharded(folder: Path, **changes: Any) -> None:
    """The same model in two shards and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({n: tensors[n] for n in some}, folder / file)
    weight_map = {n: file for file, some in shards.items() for n in some}
    (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, **changes}}))
    (folder / WEIGHTS).unlink()
