"""`btx moe` on pico mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from btx.checkpoints.reader import opened
from btx.cli.main import main
from btx.models.mixture import Moe
from btx.moe.hooks import find_routers


def moe(verb: str, *words: Path | str, out: Path, code: int = 0) -> str:
    """Run `btx moe`; it must exit with `code` and leave nothing behind except `out` if `code` is 0."""
    before = set(out.parent.iterdir())
    result = CliRunner().invoke(main, ["moe", verb, *map(str, words), "--out", str(out)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert set(out.parent.iterdir()) - before == ({out} if code == 0 else set())
    return result.output


def change(folder: Path, name: str, work: Any) -> Path:
    """Apply a change to a copy of a folder, made beside it."""
    out = folder.parent / name
    out.mkdir()
    with opened(folder) as checkpoint:
        work(out, Moe(checkpoint))
    return out


def only(model: Any, expert: int) -> None:
    """Send every token to one expert."""
    for router in find_routers(model).values():
        router.register_forward_hook(
            lambda _m, _i, out: (out[0], torch.tensor([1.0, 0.0]).expand_as(out[1]), out[2] * 0 + expert)
        )
