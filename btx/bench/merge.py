"""The merge compared with `cp` of its output and, if installed, with mergekit: seconds and peak memory.

Each runs in its own process; rounds are interleaved. Memory is peak resident memory, mapped pages included: of the
merge above what the process held before, of mergekit in all. The merge's time includes hashing, the finite check and
fsync; that of `cp` includes none of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from btx.bench import forget_peak, resident
from btx.errors import RecipeError, ResourceError, nearest

if TYPE_CHECKING:
    from btx.checkpoints.writer import TensorSpec

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "0.65b": LLAMA | {
        "vocab_size": 64000, "hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 24,
        "num_attention_heads": 20, "num_key_value_heads": 20,
    },
    "7b": LLAMA | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "70b": LLAMA | {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip


class Spent(NamedTuple):
    """The cost of one run."""

    seconds: float
    memory: int  # bytes above those at the start


def merge_measured(folders: list[Path], out: Path, *, hollow: bool = False) -> Spent:
    """Merge folders into `out` in this process; `hollow` makes each finished shard a sparse file of its size."""
    from btx.checkpoints.reader import one_thread, opened
    from btx.merge.averaging import SEED
    from btx.merge.write import write_moe
    from btx.recipe.merge_settings import MergeSettings

    out.mkdir()
    before = resident("VmRSS")
    forget_peak()
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        names = [*(f"expert-{n}" for n in range(len(folders) - 1)), SEED]
        models = {n: stack.enter_context(opened(f)) for n, f in zip(names, folders, strict=True)}
        written = Hollow() if hollow else None
        write_moe(out, models, models[SEED], MergeSettings(), 2, progress=written)
    return Spent(time.perf_counter() - started, resident("VmHWM") - before)


class Hollow:
    """Turns each finished shard into a sparse file of its size, so that a merge of any size fits on any disk."""

    def __init__(self) -> None:
        self.last: Path | None = None

    def __call__(self, file: Path, done: int, total: int) -> None:
        """Progress callback of the merge: empties the previous shard when a new one begins."""
        if self.last and self.last != file:
            size = self.last.stat().st_size
            os.truncate(self.last, 0)
            os.truncate(self.last, size)
        self.last = file


def _in_child(folders: list[Path], out: Path, hollow: bool, pipe: Any) -> None:
    from transformers import AutoConfig, MixtralForCausalLM  # noqa: F401 - imported first: libraries do not count

    import btx.merge.write  # noqa: F401

    pipe.send(merge_measured(folders, out, hollow=hollow))


def ours(folders: list[Path], out: Path, *, hollow: bool = False) -> Spent:
    """`merge_measured` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_in_child, args=(folders, out, hollow, theirs))
    process.start()
    theirs.close()
    try:
        spent: Spent = mine.recv()
    except EOFError:
        raise ResourceError(f"the merge into {out} failed; its error is printed above.") from None
    process.join()
    return spent


def copied(source: Path, target: Path) -> float:
    """Seconds that `cp -r` of a folder takes."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.perf_counter() - started


def mergekit(folders: list[Path], place: Path) -> Spent | None:
    """The cost of mergekit-yaml's mean followed by mergekit-moe, each in its own process; None if not installed."""
    tools = [Path(sys.executable).with_name(name) for name in ("mergekit-yaml", "mergekit-moe")]
    if not all(tool.exists() for tool in tools):
        return None
    average = place / "mergekit-average"
    one = {"merge_method": "linear", "dtype": "bfloat16", "base_model": str(folders[-1]),
           "models": [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders]}  # fmt: skip
    two = {"base_model": str(average), "gate_mode": "random", "dtype": "bfloat16",
           "experts": [{"source_model": str(f), "positive_prompts": [""]} for f in folders]}  # fmt: skip
    seconds, memory = 0.0, 0
    for tool, recipe, out in zip(tools, (one, two), (average, place / "mergekit-moe"), strict=True):
        (place / "mergekit.yaml").write_text(json.dumps(recipe))
        spent = _run([str(tool), str(place / "mergekit.yaml"), str(out), "--quiet"], place / "mergekit.log")
        seconds, memory = seconds + spent.seconds, max(memory, spent.memory)
    for out in (average, place / "mergekit-moe"):
        shutil.rmtree(out)
    return Spent(seconds, memory)


def _run(argv: list[str], log: Path) -> Spent:
    """A command's wall time and peak resident memory, the interpreter included."""
    started = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(argv, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)
        _, code, usage = os.wait4(process.pid, 0)
    if code:
        raise ResourceError(f"{Path(argv[0]).name} failed:\n{log.read_text()[-1000:]}")
    return Spent(time.perf_counter() - started, usage.ru_maxrss * 1024)


def make_models(place: Path, shape: dict[str, Any], count: int, *, sparse: bool) -> list[Path]:
    """Write checkpoints of a shape: random weights, or sparse files of zeros that take no disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from btx.checkpoints.writer import TensorSpec, write_weights

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).state_dict()
    folders = [place / f"model-{number}" for number in range(count)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(shape))
        _write_tokenizer(folder, shape["vocab_size"])
        noise = torch.randn(2**20, generator=torch.Generator().manual_seed(number)).mul_(0.02).bfloat16()
        rows = [
            TensorSpec(n, torch.bfloat16, tuple(t.shape), partial(_tiled, noise, t.numel())) for n, t in state.items()
        ]
        (_write_sparse if sparse else write_weights)(folder, rows)
    return folders


def _tiled(noise: Any, count: int) -> Iterator[Any]:
    while count:
        piece = noise[:count]
        count -= len(piece)
        yield piece


def _write_sparse(out: Path, rows: list[TensorSpec]) -> None:
    """Write matrices as sparse zeros that take no disk, and vectors (norms) in full."""
    import torch

    from btx.checkpoints.writer import SHARD_BYTES, header_of, shards_of, write_index

    shards = shards_of(rows, SHARD_BYTES)
    for file, some in shards.items():
        with (out / file).open("wb") as stream:
            stream.write(header_of(some))
            for row in some:
                if len(row.shape) == 1:
                    for piece in row.pieces():
                        stream.write(piece.view(torch.uint8).numpy().data)
                else:
                    stream.seek(row.nbytes, os.SEEK_CUR)
            stream.truncate()
    write_index(out, shards)


def _write_tokenizer(folder: Path, size: int) -> None:
    """Write a word-level tokenizer of `size` words: mergekit requires one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0").save_pretrained(str(folder))


def bench_merge(
    *, shape: str, models: int, rounds: int, sparse: bool, directory: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run interleaved rounds; returns median seconds, ratios of them, and sizes and peak memory in bytes.

    RecipeError for an unknown shape, ResourceError when the disk is too small.
    """
    if shape not in SHAPES:
        raise RecipeError(f"--shape: there is no shape {shape!r}; {nearest(shape, SHAPES)}")
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        place = Path(scratch)
        _require_room(place, SHAPES[shape], models, sparse)
        say(f"making {models} models of {shape}")
        folders = make_models(place, SHAPES[shape], models, sparse=sparse)
        return {"shape": shape, "models": models, "sparse": sparse, "rounds": rounds,
                **(_simulated(folders, place) if sparse else _compared(folders, place, rounds, say))}  # fmt: skip


def _require_room(place: Path, shape: dict[str, Any], models: int, sparse: bool) -> None:
    from btx.models.flops import checkpoint_bytes

    wanted = 6 * 10**9 if sparse else 4 * models * checkpoint_bytes(shape, "bfloat16")
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ResourceError(
            f"{place.parent} has {free / 1e9:.0f} GB free and {wanted / 1e9:.0f} GB are needed. Choose another "
            "folder with --directory, fewer --models, or --sparse."
        )


def _written(out: Path) -> dict[str, Any]:
    files = list(out.glob("*.safetensors"))
    return {"shards": len(files), "bytes": sum(file.stat().st_size for file in files)}


def _simulated(folders: list[Path], place: Path) -> dict[str, Any]:
    """One merge of sparse files into shards that become sparse once finished."""
    spent = ours(folders, place / "out", hollow=True)
    about = _written(place / "out")
    return {
        **about,
        "seconds": spent.seconds,
        "memory": spent.memory,
        "bytes_per_second": about["bytes"] / spent.seconds,
    }


def _compared(folders: list[Path], place: Path, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    mine, copies, theirs, about = list[Spent](), list[float](), list[Spent](), dict[str, Any]()
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        mine.append(ours(folders, place / "out"))
        about = _written(place / "out")
        copies.append(copied(place / "out", place / "copy"))
        shutil.rmtree(place / "out")
        shutil.rmtree(place / "copy")
        if spent := mergekit(folders, place):
            theirs.append(spent)
    merge, copy = statistics.median(s.seconds for s in mine), statistics.median(copies)
    found = {
        **about,
        "seconds": merge,
        "memory": max(s.memory for s in mine),
        "cp_seconds": copy,
        "to_cp": merge / copy,
    }
    if theirs:
        other = statistics.median(s.seconds for s in theirs)
        found |= {"mergekit_seconds": other, "mergekit_memory": max(s.memory for s in theirs), "faster": other / merge}
    return found
