"""Errors for a folder that holds no checkpoint btx can read: they say what the folder is, and the remedy.

They judge by the names of files and folders, and by a file's first bytes; no weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from btx.errors import ArtifactError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POINTER = b"version https://git-lfs"  # first bytes of the pointer to a file that git-lfs has not fetched
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
ANEW = "Load and save it again: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
CONVERT = "If you trust it, convert it once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
OTHERS = {  # weights of other programs, by file extension
    ".gguf": "weights for llama.cpp",
    ".msgpack": "weights for Flax",
    ".h5": "weights for TensorFlow",
    ".npz": "weights for MLX or numpy",
    ".onnx": "weights for ONNX",
    ".distcp": "a sharded FSDP checkpoint",
}


def is_pointer(path: Path) -> bool:
    """Whether a file is only a git-lfs pointer."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_pointer(path: Path) -> None:
    """ArtifactError for a file that git-lfs has not fetched."""
    if is_pointer(path):
        raise ArtifactError(f"{path} is a git-lfs pointer, not the file. Fetch it: git lfs pull in {path.parent}.")


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model, in whatever format; those of an adapter do not count."""
    names = (p.name for end in ("*.safetensors", "*.bin", INDEX) for p in folder.glob(end))
    return any(name.startswith(("model", "pytorch_model", "consolidated")) for name in names)


def refuse_no_config(folder: Path) -> None:
    """ArtifactError that says what a folder without config.json is."""
    raise ArtifactError(f"{folder} has no {CONFIG}, so it is not a Hugging Face checkpoint. {_instead(folder)}")


def _instead(folder: Path) -> str:
    if (folder / "snapshots").is_dir():
        return f"It is the root of a model in a Hugging Face cache: name its snapshot, {_snapshot(folder)}."
    if cached := sorted(p.name for p in folder.glob("models--*") if p.is_dir()):
        return f"It is a whole Hugging Face cache: name a snapshot in it, {_snapshot(folder / cached[0])}."
    if (folder / ADAPTER).is_file():
        return "It is an adapter: a seed must be a dense model. Merge the adapter first (peft's merge_and_unload)."
    inside = [p.parent for name in (CONFIG, ADAPTER) for p in folder.glob(f"*/{name}")]
    if found := sorted({*inside}, key=_number):
        what = "checkpoints of a training run" if found[-1].name.startswith("checkpoint-") else "checkpoints in folders"
        return f"It holds {what} ({_list(p.name for p in found)}): name one, such as {found[-1]}."
    if found_files := [p.name for end in OTHERS for p in folder.glob(f"*{end}")]:
        return f"It holds {_other(found_files)}. Use the original with {CONFIG} and safetensors."
    if (folder / "params.json").is_file():
        return "It is in its maker's own format (params.json): use the folder that was converted for transformers."
    return "Correct the path, or fetch it again."


def _snapshot(folder: Path) -> Path:
    """The snapshot that refs/main names, else the last by name."""
    main = folder / "refs" / "main"
    named = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    if re.fullmatch(r"\w+", named) and (folder / "snapshots" / named).is_dir():
        return folder / "snapshots" / named
    found = sorted(p for p in (folder / "snapshots").glob("*") if p.is_dir())
    return found[-1] if found else folder / "snapshots" / "REVISION"


def _number(path: Path) -> tuple[int, str]:
    last = re.search(r"(\d+)$", path.name)
    return (int(last[1]) if last else -1, path.name)


def _list(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")


def _other(files: list[str]) -> str:
    return f"{OTHERS[Path(files[0]).suffix]} ({_list(files)})"


def refuse_adapter(folder: Path) -> None:
    """ArtifactError for an adapter in a folder that is read as a model: transformers would load the adapter's base."""
    if not (folder / ADAPTER).is_file():
        return
    if holds_weights(folder):
        raise ArtifactError(
            f"{folder} holds a model and an adapter ({ADAPTER}), and it is not clear which is meant. Remove {ADAPTER} "
            "if it is the model, or move the adapter into a folder of its own."
        )
    raise ArtifactError(
        f"{folder} is an adapter ({ADAPTER}), where a dense model belongs. Merge it first (peft's merge_and_unload, "
        "then save_pretrained), and name the dense folder."
    )


def refuse_no_weights(folder: Path) -> None:
    """ArtifactError that says what a folder without model.safetensors and without its index holds instead."""
    parts = sorted(p.name for p in folder.glob("model-*-of-*.safetensors"))
    if parts == ["model-00001-of-00001.safetensors"]:
        raise ArtifactError(
            f"{folder} holds its weights as {parts[0]} without an index, which transformers does not find. It is the "
            f"whole model: rename it to {SINGLE}."
        )
    if parts:
        raise ArtifactError(
            f"{folder} holds shards ({_list(parts)}) without {INDEX}, the map of tensors to shards. Fetch that file."
        )
    pickles = sorted(p.name for end in ("*.bin", "*.pt", "*.pth") for p in folder.glob(end) if not _of_training(p.name))
    if pickles:
        raise ArtifactError(f"{folder} holds its weights as pickle ({_list(pickles)}), which can run code. {CONVERT}")
    if pieces := sorted(p.name for p in (*folder.glob("global_step*"), *folder.glob("*fsdp*")) if p.is_dir()):
        raise ArtifactError(
            f"{folder} holds a sharded checkpoint of DeepSpeed or FSDP ({_list(pieces)}), not the model. "
            "Consolidate it first (zero_to_fp32.py of DeepSpeed, or `accelerate merge-weights`)."
        )
    if others := [p.name for end in OTHERS for p in folder.glob(f"*{end}")]:
        raise ArtifactError(f"{folder} holds {_other(others)}, not safetensors. Use the original checkpoint.")
    if named := sorted(p.name for p in folder.glob("*.safetensors")):
        own = "its maker's own names" if named[0].startswith("consolidated") else "another name"
        raise ArtifactError(
            f"{folder} holds weights under {own} ({_list(named)}), and no {SINGLE} or {INDEX}. Use the folder that was "
            f"converted for transformers, or rename the file to {SINGLE} if it is the whole model."
        )
    raise ArtifactError(
        f"{folder} has no {SINGLE} and no {INDEX}: it holds no weights. Correct the path, or fetch them."
    )


def _of_training(name: str) -> bool:
    """Whether a pickle holds training state, not a model's weights."""
    return name.startswith(("training_args", "optimizer", "scheduler", "scaler", "rng_state"))


def refuse_wrapped(folder: Path, names: Iterable[str]) -> None:
    """ArtifactError for tensor names that carry a wrapper's prefix, or lack the prefix `model.`."""
    for name in names:
        if found := next((part for part in name.split(".") if part in WRAPPERS), None):
            raise ArtifactError(
                f"{folder} was saved inside a wrapper: its tensors are named {found}.… (such as {name}), which "
                "transformers does not know. Unwrap the model before saving it (model.module, model._orig_mod, or "
                f"accelerate's unwrap_model), or strip `{found}.` from the names."
            )
        if name == "embed_tokens.weight":
            raise ArtifactError(
                f"{folder} was saved from the base model, without its head: {name} and the others lack the prefix "
                f"`model.`. {ANEW}"
            )


def refuse_integers(path: Path, name: str, dtype: str) -> None:
    """ArtifactError for an integer tensor that is a buffer, not a quantised weight."""
    if re.fullmatch(r"[IU]\d+|BOOL", dtype) and not re.search(r"weight|zeros|g_idx|scales|packed|SCB", name):
        raise ArtifactError(
            f"{path}: {name} is an integer tensor ({dtype}), a buffer that some tools store and not a weight. {ANEW}"
        )
