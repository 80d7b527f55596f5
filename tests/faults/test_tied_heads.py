"""Tied and untied output heads, whichever of head and embedding is stored: read as transformers does, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from btx.checkpoints.reader import Checkpoint, opened
from btx.errors import ArtifactError
from btx.graph.artifact import write_json
from btx.recipe.settings import ExportSettings
from btx.steps.branch import require_complete
from btx.steps.export import write_model
from tests.support.merges import load, logits, merge
from tests.support.mixtures import moe
from tests.support.models import config_of, save_model
from tests.support.world import World, refused

EMBEDDING, HEAD, WEIGHTS = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
STORED: dict[str, Callable[[Tensors], Tensors]] = {
    "the embedding": lambda t: t,
    "both, equal": lambda t: {**t, HEAD: t[EMBEDDING].clone()},
    "both, equal in another precision": lambda t: {
        **t, EMBEDDING: t[EMBEDDING].bfloat16().float(), HEAD: t[EMBEDDING].bfloat16()
    },
    "the head": lambda t: {**{n: v for n, v in t.items() if n != EMBEDDING}, HEAD: t[EMBEDDING]},
}  # fmt: skip
OTHER = lambda t: {**t, HEAD: t[EMBEDDING] + torch.eye(*t[EMBEDDING].shape) * 1e-3}  # noqa: E731


def tied(folder: Path, change: Callable[[Tensors], Tensors], *, family: str = "llama", noise: float = 0.0) -> Path:
    """A tied model with changed stored tensors."""
    save_model(folder, config_of(family, tie_word_embeddings=True), noise=noise)
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("stored", STORED)
def test_a_tied_model_gives_its_stock_logits_whichever_is_stored(tmp_path: Path, family: str, stored: str) -> None:
    seed = tied(tmp_path / "seed", STORED[stored], family=family)
    wanted = logits(AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32))
    with opened(seed) as found:
        require_complete(found)
        assert HEAD not in found.entries
    made = merge(tmp_path / "moe", [seed, seed], top_k=2)
    assert HEAD not in Checkpoint(made).entries
    torch.testing.assert_close(logits(load(made)), wanted, atol=1e-5, rtol=0)
    out = tmp_path / "export"
    out.mkdir()
    write_model(made, out, ExportSettings())
    torch.testing.assert_close(logits(load(out)), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored", STORED)
def test_seeds_and_experts_store_what_they_like(world: World, stored: str) -> None:
    tied(world.seed, STORED["the embedding"])
    tied(world.law, STORED[stored], noise=0.01)
    world.examine()


@pytest.mark.parametrize("which", ["seed", "law"])
def test_a_head_that_is_stored_with_other_values_is_refused(world: World, which: str) -> None:
    for folder in (world.seed, world.law):
        tied(folder, OTHER if folder.name == which else STORED["the head"])
    refused(world.write(), world.runs, 3, (which, HEAD, "other values", "tie_word_embeddings: false", "or remove"))


def test_both_remedies_do(tmp_path: Path) -> None:
    seed = tied(tmp_path / "seed", OTHER)
    stock = logits(AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32))
    config = json.loads((seed / "config.json").read_text())
    write_json(seed / "config.json", {**config, "tie_word_embeddings": False})
    with opened(seed) as found:
        require_complete(found)
        assert HEAD in found.entries
    made = merge(tmp_path / "moe", [seed, seed], top_k=1)
    torch.testing.assert_close(logits(load(made)), stock, atol=1e-5, rtol=0)
    write_json(seed / "config.json", config)
    save_file({n: t for n, t in load_file(seed / WEIGHTS).items() if n != HEAD}, seed / WEIGHTS)
    assert HEAD not in Checkpoint(seed).entries


def test_a_head_of_another_shape_or_in_another_shard_is_looked_at(tmp_path: Path) -> None:
    seed = tied(tmp_path / "seed", lambda t: {**t, HEAD: t[EMBEDDING][:5].clone()})
    with pytest.raises(ArtifactError, match="other values"):
        Checkpoint(seed)
    seed = tied(tmp_path / "two", STORED["the embedding"])
    tensors = load_file(seed / WEIGHTS)
    (seed / WEIGHTS).unlink()
    save_file(tensors, seed / "a.safetensors")
    save_file({HEAD: tensors[EMBEDDING].clone()}, seed / "b.safetensors")
    names = {**dict.fromkeys(tensors, "a.safetensors"), HEAD: "b.safetensors"}
    (seed / INDEX).write_text(json.dumps({"weight_map": names}))
    digest = Checkpoint(seed).digest()
    save_file({HEAD: tensors[EMBEDDING] + 1}, seed / "b.safetensors")
    with pytest.raises(ArtifactError, match="other values"):
        Checkpoint(seed)
    save_file({HEAD: tensors[EMBEDDING].half().float()}, seed / "b.safetensors")
    save_file({**tensors, EMBEDDING: tensors[EMBEDDING].half().float()}, seed / "a.safetensors")
    assert Checkpoint(seed).digest() != digest


@pytest.mark.parametrize("gone", [HEAD, EMBEDDING])
def test_an_untied_model_with_one_of_the_two_is_refused_with_the_flag_that_would_tie_it(
    world: World, gone: str
) -> None:
    tensors = load_file(world.seed / WEIGHTS)
    tensors.pop(gone)
    save_file(tensors, world.seed / WEIGHTS)
    refused(world.write(), world.runs, 3, (gone, "missing", "tie_word_embeddings: true"))


def test_btx_moe_refuses_a_mixture_and_an_expert_with_another_head(tmp_path: Path) -> None:
    seed = tied(tmp_path / "seed", STORED["both, equal"])
    made = merge(tmp_path / "moe", [seed, seed], top_k=1)
    moe("replace", made, tied(tmp_path / "one", STORED["the head"]), "--name", "1", out=tmp_path / "ok")
    said = moe("replace", made, tied(tmp_path / "two", OTHER), "--name", "1", out=tmp_path / "x", code=3)
    assert "other values" in said
    bad = Path(shutil.copytree(made, tmp_path / "bad"))
    save_file(OTHER(load_file(bad / WEIGHTS)), bad / WEIGHTS)
    assert "other values" in moe("remove", bad, "--name", "1", out=tmp_path / "y", code=3)
