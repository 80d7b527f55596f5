"""Compares tokenizers by the token ids they give, and carries one over to another model type with the same ids.

A tokenizer is compared as it loads, not as it is written: transformers chooses its class by tokenizer_config.json and
by the model type in config.json, and some classes build their own pipeline from the vocabulary. So the same files may
give other ids, or fail to load, beside a Mixture of Experts than beside the seed; a carried tokenizer is loaded there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from btx.checkpoints.carried import CARRIED
from btx.checkpoints.layouts import CONFIG, refuse_pointer
from btx.checkpoints.names import SEEING
from btx.checkpoints.reader import carry_files
from btx.checkpoints.validate import read_config
from btx.errors import ArtifactError
from btx.graph.artifact import file_digest, fingerprint, write_json

JSON = "tokenizer.json"
MODEL_FILES = (JSON, "tokenizer.model", "vocab.json")
STAYS = ("generation_config.json", "chat_template.jinja")  # carried files that do not affect ids
OFFSETS = ("trim_offsets",)  # options that change offsets but no ids
NAMES = {"model": "vocabulary, merges or options"}
Map = dict[str, Any]
DECIDING = ("model_type", "tokenizer_class", "model_name", "_name_or_path")  # what AutoTokenizer reads of a config
KEPT = 8  # maps that a process remembers: tens of MB each
_KNOWN: dict[str, tuple[Map, str]] = {}


def tokenizer_digest(folder: Path, beside: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of what decides the ids of a folder's tokenizer, whatever its files' formatting.

    `beside` is the config of the model that it is loaded with; by default the folder's own.
    """
    return _known(folder, beside)[1]


def token_map(folder: Path, beside: Mapping[str, Any] | None = None) -> Map:
    """What decides the ids: model (vocabulary, merges, ...), normalizer, pre_tokenizer, post_processor, added tokens.

    The map is cached and shared: do not mutate it. ArtifactError for a folder without a tokenizer, or with a damaged
    one.
    """
    return _known(folder, beside)[0]


def _known(folder: Path, beside: Mapping[str, Any] | None) -> tuple[Map, str]:
    """A map and its digest, cached per process by file content and config: loading a tokenizer takes a second."""
    files = [(name, file_digest(folder / name)) for name in CARRIED if name not in STAYS and (folder / name).is_file()]
    config = beside or _config(folder)
    key = fingerprint([files, {k: config.get(k) for k in DECIDING} if isinstance(config, Mapping) else None])
    if key not in _KNOWN:
        found = _token_map(folder, beside)
        if len(_KNOWN) == KEPT:
            del _KNOWN[next(iter(_KNOWN))]
        _KNOWN[key] = found, fingerprint(found)
    return _KNOWN[key]


def _config(folder: Path) -> Any:
    """A folder's config.json, unchecked; None where it is missing or damaged."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _seen(folder: Path) -> dict[str, Any]:
    """A folder's config as AutoTokenizer sees it: by a model that sees images it chooses another class than by its
    language model."""
    checked, stored = read_config(folder), _config(folder)
    return stored if stored["model_type"] in SEEING else checked


def _token_map(folder: Path, beside: Mapping[str, Any] | None) -> Map:
    if not any((folder / name).is_file() for name in MODEL_FILES):
        raise ArtifactError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json). "
            "Copy the tokenizer files of its base model into it."
        )
    for name in CARRIED:
        refuse_pointer(folder / name)
    if (folder / JSON).is_file():
        _require_whole(folder / JSON)
    backend = getattr(load_beside(folder, beside), "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer, without the tokenizers library: only its files can be compared
        return {name: file_digest(folder / name) for name in CARRIED if (folder / name).is_file() and name not in STAYS}
    return plain(json.loads(backend.to_str()))


def load_beside(folder: Path, beside: Mapping[str, Any] | None = None) -> Any:
    """A folder's tokenizer, as transformers loads it beside a model with the config `beside`, or the folder's own."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.for_model(**deepcopy(dict(beside))) if beside else None
        return AutoTokenizer.from_pretrained(str(folder), config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise any of a dozen types, among them Rust's bare Exception
        why = (str(error).splitlines() or [repr(error)])[0]
        kind = f" beside a {beside['model_type']}" if beside else ""
        raise ArtifactError(
            f"the tokenizer in {folder} cannot be loaded{kind} ({why}). "
            "Copy the tokenizer files of its base model into it."
        ) from error


def _require_whole(path: Path) -> None:
    """ArtifactError for a tokenizer.json that the tokenizers library cannot read."""
    from tokenizers import Tokenizer

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data["model"]["vocab"], (dict, list)):
            raise ValueError("its vocabulary is neither an object nor a list")
        for token in data.get("added_tokens", []):
            if type(token["id"]) is not int or not isinstance(token["content"], str) or not token["content"]:
                raise ValueError(f"{token!r:.80} is not a token")
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(f"{path} is damaged ({error!r:.200}). Fetch the checkpoint again.") from error


def plain(data: Map) -> Map:
    """A serialised tokenizer in canonical form, without what does not affect ids.

    Left out: padding and truncation, which transformers sets at every call, the decoder, options of offsets, and the
    version. A dropout of zero counts as none, an empty prefix too, and a sequence of one step as that step.
    """
    model = {k: v for k, v in data["model"].items() if v is not None and v is not False and v != ""}
    if not model.get("dropout"):
        model.pop("dropout", None)
    added = sorted(data.get("added_tokens") or [], key=lambda token: int(token["id"]))
    steps = {kind: _steps(data.get(kind)) for kind in ("normalizer", "pre_tokenizer", "post_processor")}
    steps["post_processor"] = [found for step in steps["post_processor"] if (found := _marks(step))]
    return {"model": model, "added_tokens": added, **steps}


def _steps(step: Map | None) -> list[Map]:
    """The steps of a pipeline, flattened, in order, without options that do not affect ids."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        inner = next(v for k, v in step.items() if k != "type")
        return [found for part in inner for found in _steps(part)]
    return [{k: v for k, v in step.items() if k not in OFFSETS}]


def _marks(step: Map) -> Map | None:
    """The special tokens that a post-processor adds to one text; None where it only moves offsets or sets type ids."""
    if step["type"] == "ByteLevel":
        return None
    if step["type"] != "TemplateProcessing":
        return step
    pieces = [next(iter(piece.items())) for piece in step["single"]]
    marks = {value["id"] for kind, value in pieces if kind == "SpecialToken"}
    ids = {mark: step["special_tokens"][mark]["ids"] for mark in marks}
    return {"single": [[kind, value["id"]] for kind, value in pieces], "ids": ids} if marks else None


def same_files(mine: Path, theirs: Path) -> bool:
    """Whether two folders of one model type have identical tokenizer files, which then need not be loaded."""
    names = [name for name in CARRIED if name not in STAYS]
    there = [name for name in names if (mine / name).is_file()]
    if there != [name for name in names if (theirs / name).is_file()] or not {*there} & {*MODEL_FILES}:
        return False
    types = [_seen(folder).get("model_type") for folder in (mine, theirs) if (folder / CONFIG).is_file()]
    same_type = len(types) == 2 and types[0] == types[1]
    return same_type and all(file_digest(mine / name) == file_digest(theirs / name) for name in there)


def difference(mine: Map, theirs: Map) -> str:
    """The parts in which two token maps differ, added tokens aside; empty where they do not."""
    parts = sorted((mine.keys() | theirs.keys()) - {"added_tokens"})
    return ", ".join(NAMES.get(k, k) for k in parts if mine.get(k) != theirs.get(k))


def carry_tokenizer(source: Path, out: Path, like: Path) -> None:
    """Carry tokenizer and generation files over to `out`, whose config.json may name another model type than `like`'s.

    They are copied byte for byte if they give the same ids beside both, and otherwise saved again as a tokenizer.json.
    ArtifactError if that gives other ids too.
    """
    beside = _seen(like)
    wanted = token_map(source, beside)
    _clear(out)
    carry_files(source, out)
    if _same(out, wanted):
        return
    _clear(out)
    load_beside(source, beside).save_pretrained(str(out))
    if not _same(out, wanted):
        kind = read_config(out)["model_type"]
        raise ArtifactError(
            f"{source}: its tokenizer gives other ids with the model type {kind}, which the new model has, than "
            f"with {beside['model_type']}, and saving it again does not help. Use a checkpoint with its "
            "family's own tokenizer, or name its class in tokenizer_config.json (tokenizer_class: "
            "PreTrainedTokenizerFast, with a tokenizer.json)."
        )


def carry_dense(source: Path, out: Path) -> None:
    """Carry tokenizer and generation files over to a dense model, byte for byte.

    Where the source's model sees images too they are saved again if they need to be: beside its language model
    AutoTokenizer may choose another class, with other ids.
    """
    found = _config(source)
    if isinstance(found, dict) and found.get("model_type") in SEEING:
        carry_tokenizer(source, out, source)
    else:
        carry_files(source, out)


def _clear(out: Path) -> None:
    for name in CARRIED:
        if name not in STAYS:
            (out / name).unlink(missing_ok=True)


def _same(out: Path, wanted: Map) -> bool:
    try:
        return token_map(out) == wanted
    except ArtifactError:
        return False


def require_carried(folder: Path, model_type: str) -> None:
    """ArtifactError, before anything is trained, unless a seed's tokenizer gives the same ids with the merged model."""
    with tempfile.TemporaryDirectory(prefix="btx-tokenizer-") as scratch:
        carry_beside(folder, Path(scratch) / "made", model_type)


def carry_beside(folder: Path, out: Path, model_type: str) -> None:
    """Make `out` with a seed's tokenizer files, fit for this model type, and a config.json that names the type.

    ArtifactError where they cannot be made to fit.
    """
    out.mkdir()
    write_json(out / CONFIG, {"model_type": model_type})
    carry_tokenizer(folder, out, folder)
