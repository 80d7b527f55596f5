"""Checkpoint folders as found in practice: read if their meaning is certain, else refused with what they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from btx.checkpoints.reader import Checkpoint
from btx.errors import ArtifactError
from btx.merge.adapter import is_adapter
from tests.support.adapters import train_adapter
from tests.support.layouts import POINTER, Change, into_cache, put, sharded
from tests.support.models import config_of, save_model
from tests.support.world import World, refused

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def moved(name: str) -> Change:
    """Move the folder's contents into a subfolder."""

    def do(folder: Path) -> None:
        parts = list(folder.iterdir())
        (folder / name).mkdir(parents=True)
        for part in parts:
            shutil.move(part, folder / name / part.name)

    return do


def renamed(new: str, old: str = WEIGHTS) -> Change:
    """Give a file another name."""
    return lambda folder: (folder / old).rename(folder / new)


def names(change: Callable[[str], str]) -> Change:
    """Rename all tensors."""

    def do(folder: Path) -> None:
        save_file({change(n): t for n, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return do


def more(**tensors: torch.Tensor) -> Change:
    """Add tensors."""
    return lambda folder: save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)


def both(*changes: Change) -> Change:
    """Apply changes one after another."""
    return lambda folder: [change(folder) for change in changes]


def cached(folder: Path) -> None:
    """Replace the folder by the root of a hub cache entry that holds it."""
    into_cache(folder, folder.with_name("cache"))
    shutil.rmtree(folder)
    folder.with_name("cache").rename(folder)


def shards(folder: Path) -> None:
    """Make shards without an index."""
    sharded(folder)
    (folder / INDEX).unlink()
    for number, name in enumerate(("a", "b"), 1):
        (folder / f"{name}.safetensors").rename(folder / f"model-0000{number}-of-00002.safetensors")


def trainings(folder: Path) -> None:
    """Make two checkpoints of a training."""
    moved("checkpoint-500")(folder)
    shutil.copytree(folder / "checkpoint-500", folder / "checkpoint-1500")


def infix(part: str) -> Callable[[str], str]:
    return lambda n: n.replace(".self_attn.", f".{part}.self_attn.")


BUFFER = torch.arange(9)[None]
LAYOUTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "one shard without index": (renamed("model-00001-of-00001.safetensors"), ("whole model", "rename it to model.saf")),
    "shards without index": (shards, ("model-00001-of-00002", INDEX, "Fetch that file.")),
    "a cache's root": (cached, ("root of a model in a Hugging Face cache", "snapshots/" + "a" * 40)),
    "a whole cache": (
        both(cached, moved("models--org--name")), ("whole Hugging Face cache", "models--org--name/snapshots/aaa")
    ),
    "a folder of checkpoints": (trainings, ("checkpoints of a training", "such as", "/checkpoint-1500")),
    "one folder too high": (moved("model"), ("checkpoints in folders (model)", "such as")),
    "an adapter beside the model": (put("adapter_config.json"), ("a model and an adapter", "adapter_config.json")),
    "module.": (names(lambda n: f"module.{n}"), ("inside a wrapper", "module.", "Unwrap")),
    "_orig_mod.": (names(lambda n: f"_orig_mod.{n}"), ("inside a wrapper", "_orig_mod.")),
    "both of them": (names(lambda n: f"module._orig_mod.{n}"), ("inside a wrapper", "module.")),
    "compiled layers": (names(infix("_orig_mod")), ("inside a wrapper", "_orig_mod.")),
    "checkpointed layers": (names(infix("_checkpoint_wrapped_module")), ("inside a wrapper",)),
    "the body alone": (names(lambda n: n.removeprefix("model.")), ("without its head",)),
    "an integer buffer": (
        more(**{"model.position_ids": BUFFER}),
        ("position_ids is an integer tensor (I64)", "buffer"),
    ),
    "a mask": (more(**{"model.mask": BUFFER.bool()}), ("model.mask is an integer tensor (BOOL)", "save it again")),
    "a mask in bytes": (more(**{"model.mask": BUFFER.byte()}), ("model.mask is an integer tensor (U8)",)),
    "a buffer of real numbers": (
        more(**{"model.layers.0.self_attn.masked_bias": torch.zeros(1)}),
        ("masked_bias", "its class does not have", "save it again"),
    ),
    "a quantised weight": (
        more(**{"model.layers.0.mlp.up_proj.qweight": BUFFER.int()}), ("dtype I32", "unquantised")
    ),
    "a weight of bitsandbytes": (
        more(**{"model.layers.0.mlp.up_proj.weight.absmax": BUFFER.byte()}), ("dtype U8", "unquantised")
    ),
    "a dangling link": (
        lambda f: (f / "generation_config.json").unlink() or (f / "generation_config.json").symlink_to("gone"),
        ("generation_config.json is a link to", "gone, which is not there"),
    ),
    "a link to itself": (lambda f: (f / "loop").symlink_to("loop"), ("loop is a broken link",)),
    "weights not fetched": (put(WEIGHTS, POINTER), (WEIGHTS, "git-lfs pointer", "git lfs pull")),
    "tokenizer not fetched": (put("tokenizer.json", POINTER), ("tokenizer.json", "git-lfs pointer")),
    "config not fetched": (put("config.json", POINTER), ("config.json", "git-lfs pointer")),
    "index not fetched": (both(sharded, put(INDEX, POINTER)), (INDEX, "git-lfs pointer")),
    "the makers' own format": (renamed("consolidated.safetensors"), ("maker's own names", "consolidated.saf")),
    "under another name": (renamed("pico.safetensors"), ("another name (pico.safetensors)", "rename the file")),
    "pickle": (renamed("pytorch_model.bin"), ("pickle", "pytorch_model.bin", "save_pretrained")),
    "parameters of the makers": (
        put("params.json", gone="config.json"), ("no config.json", "maker's own format", "converted")
    ),
    "a training's state without weights": (put("training_args.bin", gone=WEIGHTS), ("holds no weights",)),
    "pieces of DeepSpeed": (
        both(put("global_step500/x", gone=WEIGHTS), put("training_args.bin")), ("DeepSpeed", "zero_to_fp32")
    ),
    "llama.cpp's": (put("pico-q4.gguf", gone=WEIGHTS), ("llama.cpp", "pico-q4.gguf")),
    "Flax's": (put("flax_model.msgpack", gone=WEIGHTS), ("Flax", "original checkpoint")),
}  # fmt: skip


@pytest.mark.parametrize("which", ["seed", "law"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_the_sentence_says_what_it_is_and_what_to_do(world: World, case: str, which: str) -> None:
    change, words = LAYOUTS[case]
    change(world.root / which)
    refused(world.write(), world.runs, 3, words)


BESIDE: dict[str, Change] = {
    "the makers' weights": put("consolidated.safetensors", "?"),
    "a pickle of the same": put("pytorch_model.bin", "?"),
    "the original": put("original/consolidated.00.pth", "?"),
    "what git adds": both(put(".gitattributes", "?"), put(".git/config", "?")),
    "what the hub adds": put(".cache/huggingface/download/model.safetensors.metadata", "?"),
    "what a desktop adds": both(put(".DS_Store", "?"), put("Thumbs.db", "?")),
    "checkpoints of its training": lambda folder: shutil.copytree(folder, folder / "checkpoint-5"),
    "a training's state": both(put("training_args.bin", "?"), put("trainer_state.json", "?"), put("optimizer.pt", "?")),
    "other weights": both(put("model.gguf", "?"), put("flax_model.msgpack", "?")),
    "a link within": lambda folder: (folder / "again.json").symlink_to("config.json"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_lies_beside_a_model_does_not_matter(world: World, case: str) -> None:
    for folder in (world.seed, world.law):
        digest = Checkpoint(folder).digest()
        BESIDE[case](folder)
        assert Checkpoint(folder).digest() == digest
    world.examine()


@pytest.mark.filterwarnings("ignore")  # raised by imports of peft
def test_an_adapter_with_a_config_beside_it_is_an_adapter(world: World) -> None:
    train_adapter(world.seed, world.root / "lora")
    shutil.copy(world.seed / "config.json", world.root / "lora")
    assert is_adapter(world.root / "lora")
    world.set("domains.law.checkpoint", "lora")
    world.examine()
    world.set("seed.checkpoint", "lora")
    refused(world.write(), world.runs, 3, ("lora is an adapter", "where a dense model belongs", "Merge"))


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_an_adapters_checkpoints_names_one(world: World) -> None:
    train_adapter(world.seed, world.root / "lora" / "checkpoint-7")
    world.set("domains.law.checkpoint", "lora")
    refused(world.write(), world.runs, 3, ("checkpoints of a training", "lora/checkpoint-7"))


def test_a_snapshot_is_read_through_its_links_and_no_other_links_are(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    root = into_cache(seed, tmp_path / "hub" / "models--org--name")
    snapshot = root / "snapshots" / ("a" * 40)
    assert Checkpoint(snapshot).digest() == Checkpoint(seed).digest()
    shutil.copy(seed / "config.json", tmp_path / "hub" / "other.json")
    (snapshot / "x.json").symlink_to(Path("../../../other.json"))
    with pytest.raises(ArtifactError, match=r"x\.json is a link that leaves the checkpoint folder"):
        Checkpoint(snapshot)


def test_the_index_names_no_link_that_leaves(world: World) -> None:
    sharded(world.seed)
    outside = world.root / "b.safetensors"
    shutil.move(world.seed / "b.safetensors", outside)
    (world.seed / "b.safetensors").symlink_to(outside)
    refused(world.write(), world.runs, 3, ("b.safetensors is a link that leaves",))
