"""Makes a plain checkpoint of the language model in one that sees or hears too, where transformers reads the whole.

Of Qwen3.5's such checkpoints AutoModelForCausalLM reads the language model itself (`btx.checkpoints.names`); of Gemma
4's it makes the whole model, so that its language model must have a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from btx.checkpoints.carried import carried
from btx.checkpoints.layouts import CONFIG
from btx.checkpoints.names import HEAD
from btx.checkpoints.reader import Tensors, carry_files
from btx.checkpoints.validate import DTYPES, Entry, read_config, read_entries
from btx.checkpoints.writer import TensorSpec, write_weights
from btx.errors import ArtifactError, RecipeError
from btx.graph.artifact import MANIFEST, file_digest, fingerprint, publish, read_manifest, write_json

WHOLE = {"gemma4": "gemma4_text"}  # model types that hold one: that of their language model
INSIDE = "model.language_model."


def import_language_model(folder: Path, out: Path, *, say: Callable[[str], None]) -> None:
    """Write the language model of a checkpoint as a Hugging Face folder, its tensors unchanged.

    ArtifactError for a checkpoint that holds none, RecipeError for a folder that exists already.
    """
    config = read_config(folder)
    if config["model_type"] not in WHOLE:
        raise ArtifactError(
            f"{folder} is a {config['model_type']}, of which there is nothing to import: of a folder, `btx import` "
            f"takes the language model of one that sees or hears too ({', '.join(WHOLE)}). Name it as it is."
        )
    files = sorted({CONFIG, *carried(folder), *(entry.file for entry in read_entries(folder).values())})
    made = {"folder": fingerprint([[name, file_digest(folder / name)] for name in files])}
    if (out / MANIFEST).is_file() and read_manifest(out).get("made_of") == made:
        say(f"{out} already holds it")
        return
    if out.exists():
        raise RecipeError(f"{out} already exists and holds something else; name another folder.")
    text = _text_config(folder, config)
    entries = _tensors(folder, text)

    def produce(into: Path) -> None:
        source = Tensors(folder, entries)
        rows = [TensorSpec(n, DTYPES[e.dtype], e.shape, partial(source.blocks, n)) for n, e in entries.items()]
        write_weights(into, rows)
        source.close()
        write_json(into / CONFIG, text)
        carry_files(folder, into)

    publish(out.absolute(), produce, {"made_of": made})
    say(f"wrote {out}: {text['model_type']}, {sum(e.count for e in entries.values()) / 1e6:.1f}M parameters")


def _text_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The language model's config.json."""
    text, kind = config.get("text_config"), WHOLE[config["model_type"]]
    if not isinstance(text, dict) or text.get("model_type", kind) != kind:
        raise ArtifactError(f"{folder / CONFIG} has no text_config of a {kind} model. Fetch the checkpoint again.")
    stated = {key: config[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if key in config}
    return {k: v for k, v in {**stated, **text, "model_type": kind}.items() if k != "architectures"}


def _tensors(folder: Path, text: dict[str, Any]) -> dict[str, Entry]:
    """The language model's tensors under the names that its class gives them, without those that it does not read."""
    layers = int(text["num_hidden_layers"])
    sharing = range(layers - int(text.get("num_kv_shared_layers") or 0), layers)  # they use others' keys and values
    unread = tuple(f"model.layers.{n}.self_attn.{part}" for n in sharing for part in ("k_proj.", "v_proj.", "k_norm."))
    found = {}
    for name, entry in read_entries(folder).items():
        own = name.replace(INSIDE, "model.", 1) if name.startswith(INSIDE) else name if name == HEAD else ""
        if own and not own.startswith(unread):
            found[own] = entry
    if not found:
        raise ArtifactError(f"{folder} holds no tensor below {INSIDE[:-1]}. Fetch the checkpoint again.")
    return found
