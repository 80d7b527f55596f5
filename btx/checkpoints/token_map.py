"""What a tokenizer maps to what: whether two mean the same ids, and files that mean them beside another model too.

A tokenizer is compared as it loads, not as it is written: transformers chooses its class by tokenizer_config.json and
by the model type in config.json, and some classes build their own pipeline out of the vocabulary. So the same files may
give other ids, or none, beside a Mixture of Experts than beside the seed; what is carried over is tried there.
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
from btx.checkpoints.reader import carry_files
from btx.checkpoints.validate import read_config
from btx.errors import ArtifactError
from btx.graph.artifact import file_digest, fingerprint, write_json

JSON = "tokenizer.json"
MODEL_FILES = (JSON, "tokenizer.model", "vocab.json")
STAYS = ("generation_config.json", "chat_template.jinja")  # of what is carried, no part of the map
OFFSETS = ("trim_offsets",)  # options that move offsets, no ids
NAMES = {"model": "vocabulary, merges or options"}
Map = dict[str, Any]
DECIDING = ("model_type", "tokenizer_class", "model_name", "_name_or_path")  # what AutoTokenizer reads of a config
KEPT = 8  # maps that a process remembers: tens of MB each
_KNOWN: dict[str, tuple[Map, str]] = {}


def tokenizer_digest(folder: Path, beside: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of what decides the ids that a folder's tokenizer gives, not of its formatting.

    `beside` is the config of the model that it is loaded with, the folder's own if it has one.
    """
    return _known(folder, beside)[1]


def token_map(folder: Path, beside: Mapping[str, Any] | None = None) -> Map:
    """What decides the ids: model (vocabulary, merges, ...), normalizer, pre_tokenizer, post_processor, added tokens.

    It is shared by all who ask: not to be changed. ArtifactError for a folder without a tokenizer, or with one that is
    damaged.
    """
    return _known(folder, beside)[0]


def _known(folder: Path, beside: Mapping[str, Any] | None) -> tuple[Map, str]:
    """A map and its digest, of each content and config once a process, wherever it lies: to load one takes a second."""
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
    """What a folder's config.json says, as it is; None where there is none or it is damaged."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


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
    if backend is None:  # a class of its own, without the library: its files are all that can be compared
        return {name: file_digest(folder / name) for name in CARRIED if (folder / name).is_file() and name not in STAYS}
    return plain(json.loads(backend.to_str()))


def load_beside(folder: Path, beside: Mapping[str, Any] | None = None) -> Any:
    """A folder's tokenizer, as transformers loads it beside a model of this config, or of the folder's own."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.for_model(**deepcopy(dict(beside))) if beside else None
        return AutoTokenizer.from_pretrained(str(folder), config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files end in any of a dozen kinds, bare Exception of Rust among them
        why = (str(error).splitlines() or [repr(error)])[0]
        kind = f" beside a {beside['model_type']}" if beside else ""
        raise ArtifactError(
            f"the tokenizer in {folder} cannot be loaded{kind} ({why}). "
            "Copy the tokenizer files of its base model into it."
        ) from error


def _require_whole(path: Path) -> None:
    """ArtifactError for a tokenizer.json that the library does not read."""
    from tokenizers import Tokenizer

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data["model"]["vocab"], (dict, list)):
            raise ValueError("its vocabulary is none")
        for token in data.get("added_tokens", []):
            if type(token["id"]) is not int or not isinstance(token["content"], str) or not token["content"]:
                raise ValueError(f"{token!r:.80} is no token")
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(f"{path} is damaged ({error!r:.200}). Fetch the checkpoint again.") from error


def plain(data: Map) -> Map:
    """A serialised tokenizer without what does not decide ids, under one spelling.

    Left out: padding and truncation, which transformers sets anew at every call, the decoder, options of offsets, and
    the version. A dropout of zero and empty prefixes are none; a sequence of one step is that step.
    """
    model = {k: v for k, v in data["model"].items() if v is not None and v is not False and v != ""}
    if not model.get("dropout"):
        model.pop("dropout", None)
    added = sorted(data.get("added_tokens") or [], key=lambda token: int(token["id"]))
    steps = {kind: _steps(data.get(kind)) for kind in ("normalizer", "pre_tokenizer", "post_processor")}
    steps["post_processor"] = [found for step in steps["post_processor"] if (found := _marks(step))]
    return {"model": model, "added_tokens": added, **steps}


def _steps(step: Map | None) -> list[Map]:
    """The steps of a pipeline that decide ids, in order."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        inner = next(v for k, v in step.items() if k != "type")
        return [found for part in inner for found in _steps(part)]
    return [{k: v for k, v in step.items() if k not in OFFSETS}]


def _marks(step: Map) -> Map | None:
    """A post-processor's marks around one text; None where it has none: some move offsets alone, or set type ids."""
    if step["type"] == "ByteLevel":
        return None
    if step["type"] != "TemplateProcessing":
        return step
    pieces = [next(iter(piece.items())) for piece in step["single"]]
    marks = {value["id"] for kind, value in pieces if kind == "SpecialToken"}
    ids = {mark: step["special_tokens"][mark]["ids"] for mark in marks}
    return {"single": [[kind, value["id"]] for kind, value in pieces], "ids": ids} if marks else None


def same_files(mine: Path, theirs: Path) -> bool:
    """Whether two folders of one model type have the same tokenizer files, which need not be loaded to be compared."""
    names = [name for name in CARRIED if name not in STAYS]
    there = [name for name in names if (mine / name).is_file()]
    if there != [name for name in names if (theirs / name).is_file()] or not {*there} & {*MODEL_FILES}:
        return False
    types = [read_config(folder).get("model_type") for folder in (mine, theirs) if (folder / CONFIG).is_file()]
    same_type = len(types) == 2 and types[0] == types[1]
    return same_type and all(file_digest(mine / name) == file_digest(theirs / name) for name in there)


def difference(mine: Map, theirs: Map) -> str:
    """In which part two token maps differ, added tokens aside; empty where they do not."""
    parts = sorted((mine.keys() | theirs.keys()) - {"added_tokens"})
    return ", ".join(NAMES.get(k, k) for k in parts if mine.get(k) != theirs.get(k))


def carry_tokenizer(source: Path, out: Path, like: Path) -> None:
    """Carry tokenizer and generation files over to `out`, whose config.json may be of another model than `like`'s.

    They are copied byte for byte where they give the same ids beside both, and else written anew as a tokenizer.json.
    ArtifactError where that gives other ids too.
    """
    beside = read_config(like)
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
            f"{source}: its tokenizer gives other ids beside a {kind}, which the model becomes, than beside a "
            f"{beside['model_type']}, and cannot be written so that it gives the same. Use a checkpoint with its "
            "family's own tokenizer, or name its class in tokenizer_config.json (tokenizer_class: "
            "PreTrainedTokenizerFast, with a tokenizer.json)."
        )


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
    """ArtifactError, before anything is trained, unless a seed's tokenizer can go with the model that it becomes."""
    with tempfile.TemporaryDirectory(prefix="btx-tokenizer-") as scratch:
        carry_beside(folder, Path(scratch) / "made", model_type)


def carry_beside(folder: Path, out: Path, model_type: str) -> None:
    """Make `out`, with a seed's tokenizer files as they go with a model of this type, and a config.json that names it.

    ArtifactError where they do not.
    """
    out.mkdir()
    write_json(out / CONFIG, {"model_type": model_type})
    carry_tokenizer(folder, out, folder)
