"""An export copied the way people copy models still passes `btx check` and works with `btx moe`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.export.proof import PROOF, SUMS, make_proof, write_sums
from btx.graph.artifact import write_json
from btx.recipe.settings import ExportSettings
from btx.steps.export import write_model
from tests.support.layouts import POINTER, check, put, snapshot
from tests.support.merges import merge
from tests.support.mixtures import moe
from tests.support.models import config_of, save_model

NAMES = ["seed", "math", "code"]
CARD = "README.md"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixture of Experts as the export step writes it."""
    folder = tmp_path_factory.mktemp("made")
    seed = save_model(folder / "seed", config_of("llama"))
    made = merge(folder / "moe", [seed] * 3, top_k=2, router_entropy=0.5)
    out = folder / "export"
    out.mkdir()
    write_model(made, out, ExportSettings())
    write_json(out / "experts.json", {"experts": NAMES})
    (out / CARD).write_text("# A card\n\nof some lines\n")
    write_sums(out)
    assert (out / PROOF).is_file()
    assert make_proof(out)["prompts"]
    return out


def copied(change: Callable[[Path], Any]) -> Callable[[Path, Path], Path]:
    """A copy with something changed."""

    def do(folder: Path, out: Path) -> Path:
        copy = Path(shutil.copytree(folder, out / "copy"))
        change(copy)
        return copy

    return do


def linked(folder: Path, out: Path) -> Path:
    """A symbolic link to it, as runs/NAME/export is."""
    copy = Path(shutil.copytree(folder, out / "steps" / "export-abc"))
    (out / "export").symlink_to(copy.relative_to(out))
    return out / "export"


def from_the_hub(copy: Path) -> None:
    put(".gitattributes", "*.safetensors filter=lfs\n")(copy)
    put(".cache/huggingface/download/config.json.metadata", "x")(copy)
    put(".cache/huggingface/.gitignore", "*")(copy)


def from_git(copy: Path) -> None:
    for name in ("HEAD", "config", "hooks/pre-commit.sample", "lfs/objects/ab/model.safetensors"):
        put(f".git/{name}", "x")(copy)


def crlf(name: str) -> Callable[[Path], Any]:
    return lambda copy: (copy / name).write_bytes((copy / name).read_bytes().replace(b"\n", b"\r\n"))


TRAVELLED: dict[str, Callable[[Path, Path], Path]] = {
    "a snapshot of the hub's cache": snapshot,
    "a link to it": linked,
    "times": copied(lambda copy: [os.utime(p, (1, 1)) for p in copy.iterdir()]),
    "the card edited": copied(put(CARD, "another card")),
    "the card with other line ends": copied(crlf(CARD)),
    "no card": copied(lambda copy: (copy / CARD).unlink()),
    "digests with other line ends": copied(crlf(SUMS)),
    "downloaded from the hub": copied(from_the_hub),
    "cloned": copied(from_git),
    "a desktop's files": copied(lambda copy: [put(n, "?")(copy) for n in (".DS_Store", "desktop.ini", "._x.json")]),
    "a licence and a picture": copied(lambda copy: [put(n, "?")(copy) for n in ("LICENSE", "NOTICE.txt", "loss.png")]),
    "results of others": copied(put("eval_results.json")),
    "no manifest": copied(lambda copy: (copy / "btx.json").unlink(missing_ok=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAVELLED)
def test_it_passes_the_check_and_is_changed_by_btx_moe(export: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "there").mkdir()
    there = TRAVELLED[case](export, tmp_path / "there")
    assert check(there).count("ok  ") == 4
    moe("remove", there, "--name", "code", out=tmp_path / "out")
    check(tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_symlink()]


def test_masked_experts_travel_too(export: Path, tmp_path: Path) -> None:
    moe("mask", export, "--name", "math", out=tmp_path / "off")
    there = snapshot(tmp_path / "off", tmp_path)
    check(there)
    moe("unmask", there, out=tmp_path / "on")
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "on", export))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def flipped(name: str) -> Callable[[Path], Any]:
    def do(copy: Path) -> None:
        data = bytearray((copy / name).read_bytes())
        data[-3] ^= 1
        (copy / name).write_bytes(data)

    return do


def away(name: str) -> Callable[[Path], Any]:
    """Replace a file by a link out of the folder to the same bytes."""

    def do(copy: Path) -> None:
        shutil.move(copy / name, copy.parent / "elsewhere")
        (copy / name).symlink_to(copy.parent / "elsewhere")

    return do


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (flipped("model.safetensors"), "model.safetensors is missing or not what"),
    "config": (put("config.json", '{"model_type": "mixtral"}'), "config.json is missing or not what"),
    "tokenizer": (put("tokenizer.json", "{}"), "tokenizer.json is missing or not what"),
    "proof": (put(PROOF, "{}"), f"{PROOF} is missing or not what"),
    "weights not fetched": (put("model.safetensors", POINTER), "git-lfs pointer"),
    "a link that leaves": (away("model.safetensors"), "is a link that leaves"),
    "a dangling link": (
        lambda copy: (copy / PROOF).unlink() or (copy / PROOF).symlink_to("gone"), "which is not there"
    ),
    "other weights added": (put("more.safetensors", "?"), "more.safetensors is not listed"),
    "a pickle added": (put("pytorch_model.bin", "?"), "pytorch_model.bin is not listed"),
    "code added": (put("modeling_x.py", "?"), "modeling_x.py is not listed"),
    "an adapter added": (put("adapter_config.json"), "adapter_config.json is not listed"),
    "tokens added": (put("added_tokens.json"), "added_tokens.json is not listed"),
    "a template added": (put("chat_template.jinja", "x"), "chat_template.jinja is not listed"),
    "generation added": (lambda copy: put("vocab.txt", "x")(copy), "vocab.txt is not listed"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_decides_is_still_looked_at(export: Path, tmp_path: Path, case: str) -> None:
    change, said = WRONG[case]
    copy = copied(change)(export, tmp_path)
    assert said in check(copy, code=3)
    assert said in moe("remove", copy, "--name", "code", out=tmp_path / "out", code=3)


def test_a_caches_root_is_called_one(export: Path, tmp_path: Path) -> None:
    snapshot(export, tmp_path)
    said = check(tmp_path / "models--org--name", code=3)
    assert "name its snapshot" in said
    assert "snapshots/aaa" in said
