"""A GGUF file becomes a plain checkpoint with the same values, or is refused with the reason."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from btx.checkpoints.gguf import import_gguf
from btx.errors import ArtifactError, RecipeError

gguf = pytest.importorskip("gguf")
WIDTH, INNER, HEADS, KEYS, LAYERS = 64, 96, 4, 2, 2
TOKENS = ["<|endoftext|>", *(chr(c) for c in range(33, 127)), "Ġ", "th", "he", "Ġt"]


def gguf_file(path: Path, *, architecture: str = "llama", quantised: bool = True) -> Path:
    """A pico model with some of its matrices quantised to 4 bits, as such files have them."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in {"context_length": 128, "embedding_length": WIDTH, "block_count": LAYERS,
                        "feed_forward_length": INNER, "head_count": HEADS, "head_count_kv": KEYS}.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *[1] * (len(TOKENS) - 1)])
    writer.add_token_merges(["t h", "h e", "Ġ t"])
    for kind in ("bos", "eos"):
        getattr(writer, f"add_{kind}_token_id")(0)
    chance = np.random.default_rng(0)
    half = WIDTH // HEADS * KEYS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (half, WIDTH), "attn_v": (half, WIDTH), "attn_output": (WIDTH, WIDTH),
              "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}  # fmt: skip
    tensors: dict[str, Any] = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{n}.weight": shape for n, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{n}.weight": (WIDTH,) for n in ("attn_norm", "ffn_norm")}
    for name, shape in tensors.items():
        values = (chance.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        if quantised and "ffn" in name and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good one."""
    logging.disable_progress_bar()
    return gguf_file(tmp_path / "pico.gguf")


def write(file: Path, folder: Path, **more: Any) -> list[str]:
    """Import it; returns what was said."""
    said: list[str] = []
    import_gguf(file, folder, **{"dtype": "fp32", "sha256": None, "say": said.append, **more})
    return said


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Of one text."""
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).logits
    return found


def test_the_checkpoint_has_the_logits_and_ids_of_the_file(file: Path, tmp_path: Path) -> None:
    write(file, tmp_path / "plain", sha256=hashlib.sha256(file.read_bytes()).hexdigest().upper())
    place = {"gguf_file": file.name, "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **place)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)("the cat, then that")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("the cat, then that")["input_ids"] == ids
    assert len(set(ids)) > 5
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=0, rtol=0)
    assert not hasattr(ours.config, "quantization_config")
    assert "SHA-256" in (tmp_path / "plain/README.md").read_text()


def test_the_checkpoint_is_a_seed(file: Path, tmp_path: Path) -> None:
    from btx.checkpoints.reader import opened
    from btx.steps.branch import check_buildable, require_complete, require_ids

    write(file, tmp_path / "plain", dtype="bf16")
    with opened(tmp_path / "plain") as seed:
        require_complete(seed)
        require_ids(seed)
        check_buildable(seed.config, "the seed")
        assert seed.dtype == torch.bfloat16


def test_a_second_import_finds_the_folder_and_another_file_does_not_overwrite_it(file: Path, tmp_path: Path) -> None:
    write(file, tmp_path / "plain")
    assert write(file, tmp_path / "plain") == [f"{tmp_path / 'plain'} already holds it"]
    other = gguf_file(tmp_path / "other.gguf", quantised=False)
    with pytest.raises(RecipeError, match="already exists and holds something else"):
        write(other, tmp_path / "plain")
    with pytest.raises(RecipeError, match="already exists"):
        write(file, tmp_path / "plain", dtype="bf16")


def test_what_is_no_such_file_is_refused(file: Path, tmp_path: Path) -> None:
    strange = gguf_file(tmp_path / "strange.gguf", architecture="mamba9")
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(file.read_bytes()[:100])
    text = tmp_path / "text.gguf"
    text.write_text("a model")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (strange, {}, r"architecture mamba9, which .* does not know. It knows .*llama.*qwen2"),
        (torn, {}, r"damaged|cannot read"),
        (text, {}, r"not a GGUF file: it begins with b'a mo'"),
        (tmp_path / "none.gguf", {}, "cannot be read: No such file"),
        (file, {"sha256": "0" * 64}, "has the SHA-256 .* not 0000"),
    ]
    for bad, more, why in cases:
        with pytest.raises(ArtifactError, match=why):
            write(bad, tmp_path / "plain", **more)
        assert not (tmp_path / "plain").exists()
