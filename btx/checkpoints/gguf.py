"""Converts a GGUF file into a plain checkpoint folder, by transformers' own GGUF loader.

Quantised weights are dequantised: the folder has their rounded values, not those from before quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx.errors import ArtifactError, RecipeError, ResourceError
from btx.graph.artifact import MANIFEST, file_digest, publish, read_manifest

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
LEFT = ("quantization_config", "_model_name_or_path")  # dropped from the loader's config: how the file was read
DTYPES = ("bf16", "fp16", "fp32")


def import_gguf(file: Path, folder: Path, *, dtype: str, sha256: str | None, say: Callable[[str], None]) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder of `dtype` (bf16, fp16, fp32).

    fp32 keeps the dequantised values exactly. ArtifactError for a file that is not GGUF, has another SHA-256 than
    asked for, or is of a family that transformers' loader does not know; RecipeError for a folder that exists already.
    """
    found = _checked(file, sha256)
    made = {"gguf": file.name, "sha256": found, "dtype": dtype}
    if (folder / MANIFEST).is_file() and read_manifest(folder).get("made_of") == made:
        say(f"{folder} already holds it")
        return
    if folder.exists():
        raise RecipeError(f"{folder} already exists and holds something else; name another folder.")
    kind = require_known(file)
    say(f"reading {file.name} ({kind}, {file.stat().st_size / 1e6:.0f} MB)")
    model, tokenizer = _loaded(file)

    def produce(out: Path) -> None:
        _write(model, out, dtype)
        tokenizer.save_pretrained(str(out))
        (out / "README.md").write_text(_card(file, found, dtype), encoding="utf-8")

    publish(folder.absolute(), produce, {"made_of": made, "architecture": kind})
    say(f"wrote {folder}: {model.config.model_type}, {model.num_parameters() / 1e6:.1f}M parameters, {dtype}")


def _checked(file: Path, sha256: str | None) -> str:
    """The SHA-256 of a file; ArtifactError unless it begins with GGUF's magic bytes."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
        digest = file_digest(file)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror or error}. Name a GGUF file.") from error
    if magic != MAGIC:
        raise ArtifactError(f"{file} is not a GGUF file: it begins with {magic!r}, not with {MAGIC!r}.")
    if sha256 and digest != sha256.lower():
        raise ArtifactError(f"{file} has the SHA-256 {digest}, not {sha256}: it is another file, or damaged.")
    return digest


def require_known(file: Path) -> str:
    """The architecture that a GGUF file names; ArtifactError unless transformers' loader knows it."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ResourceError("reading GGUF needs the package gguf: `pip install gguf` (or btx[gguf]).") from error
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        field = GGUFReader(str(file)).fields["general.architecture"]
        kind = str(field.contents())
    except Exception as error:  # on a damaged file its parser raises any of several numpy errors
        raise ArtifactError(f"{file} is damaged: its header cannot be read ({error}). Fetch it again.") from error
    if kind not in GGUF_SUPPORTED_ARCHITECTURES:
        known = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
        raise ArtifactError(
            f"{file} has the architecture {kind}, which transformers' GGUF loader does not know. It knows "
            f"{known}. Use the model's own checkpoint folder instead."
        )
    return kind


def _loaded(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=torch.float32, output_loading_info=True, **place
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **place)
    except Exception as error:  # the loader raises many types
        why = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"transformers cannot read {file} as a causal language model ({why}). "
            "Use the model's own checkpoint folder."
        ) from error
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise ArtifactError(f"{file} lacks tensors of {type(model).__name__}: {', '.join(wrong[:3])}. Fetch it again.")
    return model, tokenizer


def _write(model: Any, out: Path, dtype: str) -> None:
    """Save from a fresh, unquantised model, since transformers refuses to save a model that its GGUF loader made."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = {key: value for key, value in model.config.to_dict().items() if key not in LEFT}
    config = type(model.config).from_dict(plain)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(_cast(model.state_dict(), dtype), assign=True)
    fresh.tie_weights()
    fresh.config.dtype = next(fresh.parameters()).dtype
    fresh.save_pretrained(str(out))


def _cast(state: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    from btx.recipe.settings import torch_dtype

    wanted = torch_dtype(dtype, next(iter(state.values())).dtype)
    return {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _card(file: Path, digest: str, dtype: str) -> str:
    return f"""# {file.stem}, dequantised

Made from `{file.name}` (SHA-256 `{digest}`) by `btx import`, through transformers' GGUF loader. Its weights are those
of the quantised file as {dtype}, not the ones that were quantised once.
"""
