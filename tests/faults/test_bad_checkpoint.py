"""A checkpoint that is damaged, unsafe or unrelated ends `btx run` with exit code 3 before anything is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from btx.checkpoints.reader import Checkpoint
from tests.support.layouts import INDEX, WEIGHTS, sharded
from tests.support.models import config_of, save_model, tokenizer_into
from tests.support.world import Break, World, edit_json, refused


def config(which: str, **changes: Any) -> Break:
    """Change a config.json."""
    return lambda world: edit_json(world.root / which / "config.json", **changes)


def weights(which: str, change: Any) -> Break:
    """Change the tensors of a checkpoint."""

    def do(world: World) -> None:
        path = world.root / which / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return do


def bytes_of(change: Any) -> Break:
    """Change the bytes of the seed's weight file."""

    def do(world: World) -> None:
        path = world.seed / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return do


def header(change: Any) -> Break:
    """Change the header text of the seed's weight file, with its length field corrected."""

    def do(data: bytes) -> bytes:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        text = change(data[8:end])
        return struct.pack("<Q", len(text)) + text + data[end:]

    return bytes_of(do)


def index(**changes: Any) -> Break:
    """Shard the seed and change its weight map."""
    return lambda world: sharded(world.seed, **changes)


def link(name: str) -> Break:
    """Replace a file of the seed by a symbolic link to a file outside the folder."""

    def do(world: World) -> None:
        moved = world.root / "elsewhere"
        shutil.move(world.seed / name, moved)
        (world.seed / name).symlink_to(moved)

    return do


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


def pickled(world: World) -> None:
    """Pickled weights that contain code."""
    (world.seed / WEIGHTS).unlink()
    (world.seed / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))


def put(name: str, text: str) -> Break:
    """Write a file into the seed's folder."""
    return lambda world: (world.seed / name).write_text(text)


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no folder": (lambda w: w.set("seed.checkpoint", "sede"), ("seed.checkpoint", "'seed'", "relative")),
    "a hub name": (lambda w: w.set("seed.checkpoint", "meta/Llama"), ("seed.checkpoint", "local Hugging Face")),
    "unknown user": (lambda w: w.set("seed.checkpoint", "~nobody-here/x"), ("seed.checkpoint", "~nobody-here")),
    "no expert": (lambda w: w.set("domains.law.checkpoint", "lwa"), ("domains.law.checkpoint", "'law'")),
    "no config": (lambda w: (w.seed / "config.json").unlink(), ("config.json", "not a Hugging Face checkpoint")),
    "config is a list": (put("config.json", "[]"), ("config.json", "model_type")),
    "config is broken": (put("config.json", '{"a": '), ("config.json", "JSON")),
    "config without end": (put("config.json", "[" * 200_000), ("config.json", "JSON")),
    "unknown family": (config("seed", model_type="gemma"), ("gemma", "Use one of llama, phi3, mistral, qwen2, ")),
    "a mixture by its config": (config("seed", model_type="mixtral"), ("disagree", "block_sparse_moe", "missing")),
    "width in words": (config("seed", hidden_size="wide"), ("config.json", "hidden_size", "Correct it")),
    "odd heads": (config("seed", num_attention_heads=5), ("config.json", "attention heads")),
    "unknown activation": (config("seed", hidden_act="nope"), ("config.json", "nope")),
    "unknown dtype": (config("seed", dtype="float99"), ("config.json", "float99")),
    "layers that are not there": (config("seed", num_hidden_layers=3), ("model.layers.2.", "missing", "config.json")),
    "layers unsaid": (config("seed", num_hidden_layers=None), ("does not state num_hidden_layers", "Add")),
    "layers too many": (config("seed", num_hidden_layers=1), ("model.layers.1.", "missing")),
    "another vocabulary size": (config("seed", vocab_size=299), ("lm_head.weight", "300x32", "299x32")),
    "head neither stored nor tied": (weights("seed", lambda t: t.pop("lm_head.weight")), ("lm_head.weight", "missing")),
    "its own code": (config("seed", auto_map={"AutoModel": "m.M"}), ("auto_map", "runs no code")),
    "a script": (put("modeling.py", "raise SystemExit"), ("modeling.py", "runs no code")),
    "code in the tokenizer": (
        lambda w: edit_json(w.seed / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}),
        ("auto_map in tokenizer_config.json",),
    ),
    "trusted code": (config("seed", trust_remote_code=True), ("trust_remote_code", "runs no code")),
    "quantised": (config("seed", quantization_config={"bits": 4}), ("quantised", "unquantised checkpoint")),
    "a kernel of a hub": (config("seed", attn_implementation="org/repo"), ("attn_implementation", "Remove that key")),
    "a kernel of a hub within": (config("seed", x={"_attn_implementation": "flash_attention_2"}), ("flash_attention",)),
    "pickle": (pickled, ("pickle", "pytorch_model.bin", "save_pretrained")),
    "no weights": (lambda w: (w.seed / WEIGHTS).unlink(), ("no weights", WEIGHTS)),
    "empty file": (bytes_of(lambda b: b""), (WEIGHTS, "0 bytes", "Fetch it again")),
    "four bytes": (bytes_of(lambda b: b[:4]), (WEIGHTS, "4 bytes")),
    "half of it": (bytes_of(lambda b: b[: len(b) // 2]), (WEIGHTS, "should hold", "Fetch it again")),
    "one byte less": (bytes_of(lambda b: b[:-1]), (WEIGHTS, "should hold")),
    "one byte more": (bytes_of(lambda b: b + b"x"), (WEIGHTS, "should hold")),
    "header of 200 MB": (bytes_of(lambda b: struct.pack("<Q", 200 << 20) + b[8:]), ("claims 209715200 bytes",)),
    "bit flip in the header": (bytes_of(lambda b: b[:9] + bytes([b[9] ^ 128]) + b[10:]), (WEIGHTS, "damaged")),
    "duplicate key": (header(lambda h: b'{"a":1,"a":2}'), ("duplicate key 'a'",)),
    "endless header": (header(lambda h: b"[" * 200_000), (WEIGHTS, "damaged")),
    "header is a list": (header(lambda h: b"[]"), (WEIGHTS, "damaged")),
    "negative shape": (header(lambda h: h.replace(b'"shape":[32]', b'"shape":[-1,-32]')), ("shape [-1, -32]",)),
    "overlapping tensors": (header(lambda h: h.replace(b"offsets\":[38400,", b"offsets\":[384,")), ("lies at",)),
    "header as UTF-16": (header(lambda h: h.decode().encode("utf-16")), (WEIGHTS, "damaged")),
    "unknown dtype of a tensor": (header(lambda h: h.replace(b'"F32"', b'"F8_E4M3"', 1)), ("F8_E4M3", "unquantised")),
    "missing shard": (
        lambda w: (sharded(w.seed), (w.seed / "b.safetensors").unlink()),
        (INDEX, "b.safetensors", "missing"),
    ),
    "index and single file": (put(INDEX, "{}"), ("both", WEIGHTS, INDEX)),
    "index names too much": (index(ghost="a.safetensors"), ("disagree on 1", "ghost")),
    "index names the wrong shard": (index(**{NORM: "b.safetensors"}), ("disagree on 1", NORM)),
    "index leaves the folder": (index(ghost="../law/model.safetensors"), ("outside", "../law")),
    "index is absolute": (index(ghost="/etc/passwd"), ("outside", "/etc/passwd")),
    "index with NUL": (index(ghost="a\0.safetensors"), ("outside", "a\\x00")),
    "index names numbers": (index(ghost=5), (INDEX, "weight_map")),
    "index of nothing": (lambda w: (sharded(w.seed), (w.seed / INDEX).write_text("{}")), (INDEX, "weight_map")),
    "the same tensor in two shards": (
        lambda w: (sharded(w.seed), shutil.copy(w.seed / "a.safetensors", w.seed / "c.safetensors"),
                   edit_json(w.seed / INDEX, weight_map={
                       **json.loads((w.seed / INDEX).read_text())["weight_map"], NORM: "c.safetensors"})),
        ("disagree on",),
    ),
    "weights are a link": (link(WEIGHTS), (WEIGHTS, "link", "elsewhere")),
    "tokenizer is a link": (link("tokenizer_config.json"), ("tokenizer_config.json", "link", "elsewhere")),
    "no tokenizer": (lambda w: [p.unlink() for p in w.seed.glob("tokenizer*")], ("tokenizer", "base model")),
    "broken tokenizer": (put("tokenizer.json", '{"model": []}'), ("tokenizer", "base model")),
    "more ids than rows": (
        lambda w: [save_model(folder, config_of("llama", vocab_size=200)) for folder in (w.seed, w.law)],
        ("ids up to", "200 rows"),
    ),
    "NaN in the seed": (weights("seed", lambda t: t[NORM].fill_(torch.nan)), ("the seed", NORM, "32 NaN")),
    "infinity in an expert": (weights("law", lambda t: t[NORM][:3].fill_(torch.inf)), ("domain law", NORM, "3 NaN")),
    "another rope theta": (
        config("law", rope_parameters={"rope_type": "default", "rope_theta": 9.0}),
        ("rope_parameters", "5000.0", "9.0"),
    ),
    "another rope theta as of old": (config("law", rope_parameters=None, rope_theta=9.0), ("rope_parameters", "9.0")),
    "another norm epsilon": (config("law", rms_norm_eps=0.5), ("rms_norm_eps", "0.5", "does not descend")),
    "another family": (config("law", model_type="mistral"), ("model_type", "'llama'", "'mistral'")),
    "another width": (
        lambda w: save_model(w.law, config_of("llama", intermediate_size=64)),
        ("domain law", "does not descend", "cosine", "leave the domain out"),
    ),
    "a width that the weights do not have": (
        config("law", intermediate_size=64),
        ("weights and config.json disagree", "48x32, should be 64x32"),
    ),
    "less rows than tokens": (
        lambda w: save_model(w.law, config_of("llama", vocab_size=280)),
        ("law", "ids up to 288, but the embedding 280 rows", "resize"),
    ),
    "a vocabulary that its rows belie": (
        lambda w: [save_model(w.law, config_of("llama", vocab_size=301)),
                   edit_json(w.law / "config.json", vocab_size=305)],
        ("law", "model.embed_tokens.weight is 301x32, should be 305x32"),
    ),
    "tied and untied": (
        lambda w: save_model(w.law, config_of("llama", tie_word_embeddings=True)),
        ("tie_word_embeddings: seed False, expert True",),
    ),
    "another tokenizer of the same size": (
        lambda w: tokenizer_into(w.law, extra="zzyzx zzyzx qanat qanat"),
        ("domain law", "another tokenizer", "the same ids mean other tokens"),
    ),
    "a stranger of the same shape": (
        lambda w: save_model(w.law, config_of("llama"), seed=1),
        ("domain law", "does not descend", "cosine"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_checkpoint_is_refused_with_file_and_remedy(
    world: World, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    do, words = BROKEN[case]
    do(world)
    refused(world.write(), world.runs, 3, words)
    assert not (world.root / "canary").exists()


def tied(folder: Path, *, noise: float = 0.0, stored: bool) -> None:
    """A model with tied embeddings, with or without a stored head."""
    save_model(folder, config_of("llama", tie_word_embeddings=True), noise=noise)
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("lm_head.weight", None)
    if stored:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("seed", [True, False])
@pytest.mark.parametrize("expert", [True, False])
def test_tied_embeddings_are_the_same_with_and_without_a_stored_head(world: World, seed: bool, expert: bool) -> None:
    tied(world.seed, stored=seed)
    tied(world.law, noise=0.01, stored=expert)
    world.examine()
    assert Checkpoint(world.seed).entries.keys() == Checkpoint(world.law).entries.keys()
    assert "lm_head.weight" not in Checkpoint(world.seed).entries


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_expert_may_have_another_precision_than_the_seed(world: World, dtype: torch.dtype) -> None:
    save_model(world.law, config_of("llama"), noise=0.01, dtype=dtype)
    world.examine()
    assert Checkpoint(world.law).dtype is dtype


def test_an_expert_may_be_sharded_otherwise_than_the_seed(world: World) -> None:
    whole = Checkpoint(world.law)
    found = {n: whole.read(n).clone() for n in whole.entries}
    sharded(world.law)
    world.examine()
    parts = Checkpoint(world.law)
    assert found.keys() == parts.entries.keys()
    assert all(torch.equal(found[n], parts.read(n)) for n in found)


def test_links_into_the_blobs_of_a_hugging_face_cache_are_followed(world: World) -> None:
    blobs, snapshot = world.root / "hub" / "blobs", world.root / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in world.seed.iterdir():
        shutil.move(file, blobs / f"sha-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"sha-of-{file.name}")
    world.set("seed.checkpoint", str(snapshot))
    world.examine()


def test_a_file_in_the_place_of_a_folder_is_called_one(world: World) -> None:
    world.set("seed.checkpoint", "seed/config.json")
    refused(world.write(), world.runs, 3, ("seed.checkpoint", "no folder", "config.json (it is a file)"))
