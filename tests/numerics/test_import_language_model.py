"""`btx import FOLDER`: the language model of a Gemma 4 that sees and hears too, as a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from btx.checkpoints.reader import Checkpoint
from btx.errors import ArtifactError
from btx.models.families import family_of
from tests.support.command import btx
from tests.support.merges import IDS, load, logits, merge
from tests.support.models import config_of, save_model, tokenizer_into
from tests.support.world import edit_json

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Gemma 4 as the hub has it: vision beside the language model, and keys that no layer reads."""
    folder = tmp_path_factory.mktemp("gemma") / "whole"
    more: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    text = config_of("gemma4_text", num_kv_shared_layers=2, **more)
    ids = {f"{name}_token_id": 290 + n for n, name in enumerate(("boi", "eoi", "image", "video", "boa", "audio"))}
    config = AutoConfig.for_model("gemma4", text_config=text.to_dict(), vision_config=VISION, **ids)
    torch.manual_seed(1)
    model: Any = AutoModelForMultimodalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20.0 if ".mlp." in name else 1.5)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    below = "model.language_model.layers.3.self_attn"
    unread = {f"{below}.{part}_proj.weight": torch.ones(16, 32) for part in "kv"}
    save_file({**tensors, **unread}, folder / "model.safetensors", {"format": "pt"})
    tokenizer_into(folder)
    return folder


def test_it_has_the_logits_that_the_whole_has_on_text_and_becomes_a_mixture(whole: Path, tmp_path: Path) -> None:
    said = btx("import", whole, tmp_path / "text", cwd=tmp_path).stdout
    assert "gemma4_text" in said
    again = btx("import", whole, tmp_path / "text", cwd=tmp_path).stdout
    assert "already holds it" in again
    model: Any = AutoModelForMultimodalLM.from_pretrained(whole, dtype=torch.float32).eval()
    ids = IDS % 290  # no marks of images
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        found = load(tmp_path / "text")(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    made = merge(tmp_path / "moe", [tmp_path / "text"] * 2, top_k=2)
    torch.testing.assert_close(logits(load(made)), logits(load(tmp_path / "text")), atol=1e-5, rtol=0)
    refused = btx("import", whole, whole, cwd=tmp_path, code=2)
    assert "already exists" in refused.stderr


def test_a_recipe_that_names_the_whole_is_told_what_to_do(whole: Path) -> None:
    with pytest.raises(ArtifactError, match=r"btx import FOLDER NEW_FOLDER"):
        family_of(Checkpoint(whole).config, str(whole))


def test_what_holds_no_language_model_is_refused(tmp_path: Path, whole: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    assert "there is nothing to import" in btx("import", seed, tmp_path / "out", cwd=tmp_path, code=3).stderr
    for file in whole.iterdir():
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "broken" / "config.json", text_config=None)
    assert "no text_config" in btx("import", tmp_path / "broken", tmp_path / "out", cwd=tmp_path, code=3).stderr
