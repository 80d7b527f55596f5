"""A tokenizer with added tokens that is damaged, or loads differently than written, is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.vocabularies import TOKENS, extended, plain
from tests.support.world import World, edit_json, refused


def with_tokens(world: World, **changes: Any) -> Path:
    """Give the expert an added token whose entry in tokenizer.json is changed."""
    shutil.rmtree(world.seed)
    shutil.rmtree(world.law)
    plain(world.seed, "llama")
    path = extended(world.law, "llama", ["<x>"], noise=0.01) / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"][-1].update(changes)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    "changes", [{"id": "289"}, {"id": None}, {"id": 289.5}, {"content": ["<x>"]}, {"content": ""}], ids=str
)
def test_an_entry_that_is_no_token_is_refused(world: World, changes: dict[str, Any]) -> None:
    with_tokens(world, **changes)
    refused(world.write(), world.runs, 3, ("law/tokenizer.json is damaged", "is not a token"))


def test_an_id_that_the_loaded_tokenizer_does_not_have_is_refused(world: World) -> None:
    with_tokens(world, id=10**6)
    refused(world.write(), world.runs, 3, ("1000000", "'<x>'", f"tokenizer gives {TOKENS}"))


def test_a_tokenizer_without_a_vocabulary_is_refused(world: World) -> None:
    with_tokens(world)
    for folder in (world.seed, world.law):
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text())
        del data["model"]["vocab"]
        path.write_text(json.dumps(data))
    refused(world.write(), world.runs, 3, ("tokenizer", "seed", "Copy the tokenizer files"))


def test_rows_are_not_aligned_without_a_tokenizer_json(world: World) -> None:
    for folder, rows in ((world.seed, 310), (world.law, 300)):
        shutil.rmtree(folder)
        plain(folder, "llama", rows=rows, noise=0.01)
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
        edit_json(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    refused(world.write(), world.runs, 3, ("seed has no tokenizer.json", "save_pretrained"))
