"""A seed that sees images too is read as its language model, as AutoModelForCausalLM reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.token_map import token_map
from btx.checkpoints.validate import read_config, sees_images
from btx.errors import ArtifactError
from btx.models.target import warnings_of
from btx.steps.branch import check_expert
from tests.support.command import btx
from tests.support.merges import load, logits, merge
from tests.support.models import config_of, own_tokenizer, save_model, tokenizer_into
from tests.support.project import write_project
from tests.support.shapes import sparse_config
from tests.support.world import edit_json

VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip


def seeing(folder: Path, *, kind: str = "qwen3_5", tokenizer_class: str = "") -> Path:
    """A pico Qwen3.5 as the hub has it: a vision tower, and heads that predict further tokens."""
    text = config_of("qwen3_5_text") if kind == "qwen3_5" else sparse_config("qwen3_5_moe_text")
    config = AutoConfig.for_model(
        kind, text_config=text.to_dict(), vision_config=VISION, tie_word_embeddings=text.tie_word_embeddings
    )
    torch.manual_seed(1)
    model: Any = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.linspace(-0.03, 0.03, parameter.numel()).view(parameter.shape))
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "mtp.fc.weight": torch.ones(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    tokenizer_into(folder)
    own_tokenizer(folder, kind)
    if tokenizer_class:
        edit_json(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    return folder


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing(tmp_path_factory.mktemp("seed") / "seed")


def test_copies_give_the_logits_of_its_language_model(seed: Path, tmp_path: Path) -> None:
    wanted = logits(load(seed))
    assert type(load(seed)).__name__ == "Qwen3_5ForCausalLM"
    made = merge(tmp_path / "moe", [seed] * 3, top_k=2, router_entropy=0.8)
    torch.testing.assert_close(logits(load(made)), wanted, atol=1e-5, rtol=0)
    assert not any("visual" in name or "mtp" in name for name in load_file(made / "model.safetensors"))
    assert "vision_config" not in read_config(seed)
    assert warnings_of(read_config(seed), "x", sees_images=sees_images(seed))[0] == (
        "x sees images too; the merged model is made of its language model alone."
    )


def test_a_mixture_that_sees_is_read_as_its_language_model_too(tmp_path: Path) -> None:
    seed = seeing(tmp_path / "seed", kind="qwen3_5_moe")
    assert type(load(seed)).__name__ == "Qwen3_5MoeForCausalLM"
    made = merge(tmp_path / "moe", [seed] * 2, top_k=2, router="own")
    torch.testing.assert_close(logits(load(made)), logits(load(seed)), atol=1e-5, rtol=0)
    check_expert(seed, seed, "law")


def test_an_expert_that_transformers_saved_from_it_is_one_of_its_own(seed: Path, tmp_path: Path) -> None:
    """transformers keeps the names of the whole model, `model.language_model.`, in that of its language model."""
    expert = tmp_path / "expert"
    model = AutoModelForCausalLM.from_pretrained(seed)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.05)
    model.save_pretrained(expert)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (expert / name).write_bytes((seed / name).read_bytes())
    assert any(name.startswith("model.language_model.") for name in load_file(expert / "model.safetensors"))
    assert Checkpoint(expert).entries.keys() == Checkpoint(seed).entries.keys()
    check_expert(seed, expert, "law")
    made = merge(tmp_path / "moe", [expert] * 2, top_k=2)
    torch.testing.assert_close(logits(load(made)), logits(load(expert)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "named",
    [
        pytest.param("", id="own class"),
        pytest.param("Qwen2Tokenizer", id="another class in its files", marks=pytest.mark.slow),
    ],
)
def test_a_whole_run_keeps_the_ids_of_the_model_that_sees(tmp_path: Path, named: str) -> None:
    """Beside a Qwen3.5 transformers ignores the class that the files name; beside its language model it does not."""
    write_project(tmp_path, family="llama")
    for path in (tmp_path / "seed").iterdir():
        path.unlink()
    seed = seeing(tmp_path / "seed", tokenizer_class=named)
    said = btx("run", "recipe.yaml", "--until", "finetune", cwd=tmp_path)
    assert "sees images too" in said.stdout + said.stderr
    for step in ("train-math", "finetune"):
        assert token_map(tmp_path / "runs/pico" / step) == token_map(seed)


@pytest.mark.parametrize("text", [None, {"model_type": "llama"}])
def test_without_its_language_model_it_is_refused(tmp_path: Path, text: Any) -> None:
    folder = save_model(tmp_path / "seed", config_of("qwen3_5_text"))
    config = {"model_type": "qwen3_5", "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="has no text_config of a qwen3_5 model"):
        read_config(folder)
