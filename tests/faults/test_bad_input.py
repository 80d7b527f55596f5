"""A recipe or data that cannot be used is refused by `btx run` with exit code 2 before anything is written."""

from __future__ import annotations

import gzip
import subprocess
import sys
from typing import Any

import pytest

from btx.data.documents import parse
from btx.data.packed import Encoder, load_tokenizer
from tests.support.world import Break, World, refused, setting, write_jsonl


def test_the_unbroken_recipe_is_accepted_and_looking_at_it_writes_nothing(world: World) -> None:
    world.examine()
    assert not world.runs.exists()


def rows(*records: Any) -> Break:
    """Replace a domain's records by these."""
    return lambda world: write_jsonl(world.math, records)


def raw(content: bytes, name: str = "math.jsonl") -> Break:
    """Replace a domain's documents by these bytes."""

    def do(world: World) -> None:
        (world.root / "data" / name).write_bytes(content)
        world.set("domains.math.data", [f"data/{name}"])

    return do


def launch(text: str) -> Break:
    """Name a launch file that holds this text."""

    def do(world: World) -> None:
        (world.root / "two.yaml").write_text(text)
        world.set("run.launch", str(world.root / "two.yaml"))

    return do


GOOD = b'{"text": "a line that is good"}\n'
RECIPES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "unknown section": (setting("trian", {}), ("trian", "no such key", "'train'")),
    "unknown key": (setting("train.learning_rat", 1), ("train.learning_rat:", "'learning_rate'")),
    "typo in a domain": (setting("domains.math.tokns", 1), ("domains.math.tokns:", "'tokens'")),
    "a domain without data": (setting("domains.code", {"tokens": 5}), ("domains.code:", "`data`", "`checkpoint`")),
    "a domain without tokens": (setting("domains.code", {"data": ["data"]}), ("domains.code:", "`tokens`", "400k")),
    "no domains": (setting("domains", {}), ("domains:", "must not be empty")),
    "empty section": (setting("train", None), ("train:", "mapping", "None")),
    "data as one string": (setting("domains.math.data", "data/math.jsonl"), ("domains.math.data:", "list")),
    "empty string": (setting("domains.math.data", [""]), ("domains.math.data.0:", "empty")),
    "blank string": (setting("domains.math.data", [" "]), ("domains.math.data.0:", "blank")),
    "empty checkpoint": (setting("seed.checkpoint", ""), ("seed.checkpoint:", "empty")),
    "true as a number": (setting("train.learning_rate", True), ("train.learning_rate:", "true or false")),
    "text as a number": (setting("train.batch_tokens", "many"), ("train.batch_tokens:", "'many'")),
    "half a token": (setting("train.batch_tokens", "0.0005k"), ("train.batch_tokens:", "whole number")),
    "not a number": (setting("train.learning_rate", float("nan")), ("train.learning_rate:", "nan")),
    "beta of one": (setting("train.betas", [1.0, 0.9]), ("train.betas.0:", "less than 1")),
    "endless seed": (setting("train.seed", 2**80), ("train.seed:", "less than")),
    "broken batch": (setting("train.batch_tokens", 33), ("train:", "batch_tokens (33)", "multiple")),
    "broken batch of the finetuning": (
        setting("finetune.sequence_length", 64),
        ("finetune", "batch_tokens (32)", "sequence_length (64)"),
    ),
    "path-like name": (setting("domains.a/b", {"checkpoint": "law"}), ("'a/b'", "domain name")),
    "parent as a name": (
        lambda world: world.recipe["domains"].update({"..": {"checkpoint": "law"}}),
        ("'..'", "letters"),
    ),
    "Cyrillic look-alike": (setting("domains.m\u0430th", {"checkpoint": "law"}), ("m\u0430th", "letters a-z")),
    "names apart by case": (setting("domains.Math", {"checkpoint": "law"}), ("'Math'", "'math'", "case")),
    "reserved name": (setting("domains.Average", {"checkpoint": "law"}), ("'Average'", "rename the domain")),
    "mix of a stranger": (setting("finetune.mix", {"maths": 1}), ("finetune.mix:", "'maths'", "'math'")),
    "mix of a seed without data": (setting("finetune.mix", {"math": 1, "seed": 1}), ("finetune.mix", "seed", "`data`")),
    "mix of nothing": (setting("finetune.mix", {"math": 0}), ("finetune.mix", "zero", "positive")),
    "idle seed tokens": (setting("seed.tokens", 5), ("seed:", "`tokens`", "`data`")),
    "too many experts a token": (setting("finetune.top_k", 4), ("finetune.top_k is 4", "3 experts", "choose 1 to 3")),
    "slerp of three": (setting("merge.shared", "slerp"), ("merge.shared", "slerp", "3", "mean")),
    "weights of a stranger": (
        setting("merge.shared", {"method": "linear", "weights": {"sed": 1}}),
        ("merge.shared.weights", "'sed'", "'seed'"),
    ),
    "weights without effect": (setting("merge.shared", {"weights": {"seed": 2}}), ("merge.shared:", "mean", "linear")),
    "weights all zero": (
        setting("merge.shared", {"method": "linear", "weights": {"seed": 0, "math": 0, "law": 0}}),
        ("merge.shared.weights", "zero", "positive"),
    ),
    "blend that does not come out even": (
        lambda world: (
            world.set("merge.experts", "blend"),
            world.set("domains.b", {"checkpoint": "law"}),
            world.set("domains.c", {"checkpoint": "law"}),
        ),
        ("merge.experts", "48", "5 chunks"),
    ),
    "split that does not come out even": (
        lambda world: (world.set("merge.experts", "split"), world.set("merge.chunks", 7)),
        ("merge.experts", "48", "7 chunks", "another number"),
    ),
    "one expert alone": (
        lambda world: (world.set("merge.include_seed", False), world.recipe["domains"].pop("law")),
        ("two experts", "merge.include_seed: true"),
    ),
    "nothing held out": (setting("data.holdout", 0), ("data.holdout", "domains.math", "valid")),
    "everything held out": (setting("data.holdout", 1), ("data.holdout:", "less than 1")),
    "sequence longer than the seed's": (
        setting("evaluate", {"sequence_length": 129}),
        ("evaluate.sequence_length is 129", "max_position_embeddings", "128"),
    ),
    "density under the mean": (setting("merge.shared", {"density": 0.3}), ("merge.shared:", "density", "ties")),
    "place under ties": (
        setting("merge.shared", {"method": "ties", "t": 0.3}),
        ("merge.shared:", "t has no effect", "slerp"),
    ),
    "weight of the seed under ties": (
        setting("merge.shared", {"method": "ties", "weights": {"seed": 5}}),
        ("merge.shared:", "ties", "seed"),
    ),
    "ties weights all zero": (
        setting("merge.shared", {"method": "ties", "weights": {"math": 0, "law": 0}}),
        ("merge.shared.weights", "zero", "positive"),
    ),
    "export that no class can hold": (
        setting("finetune", {"tokens": 64, "routing": "sample_top1", "soft_first_layer": True}),
        ("finetune.soft_first_layer:", "no stock class", "--until evaluate"),
    ),
    "unknown kernel": (setting("run.kernel", "groupd_mm"), ("run.kernel", "'groupd_mm'", "'grouped_mm'")),
    "no launch file": (setting("run.launch", "nowhere.yaml"), ("run.launch", "nowhere.yaml", "accelerate config")),
    "launch file of nothing": (launch("{}"), ("run.launch", "two.yaml", "distributed_type", "Write it anew")),
    "launch file that is no mapping": (launch("[1"), ("run.launch", "two.yaml", "Write it anew")),
    "launch file of which one process comes": (
        launch("{distributed_type: MULTI_CPU, num_processes: 2, use_cpu: true}"),
        ("run.launch", "2 processes", "MULTI_CPU", "MULTI_GPU", "FSDP"),
    ),
    "odd heads of a builtin seed": (
        setting("seed", {"checkpoint": "builtin", "builtin": {"hidden_size": 30}}),
        ("seed.builtin:", "hidden_size (30)", "multiple"),
    ),
    "long sequences of a builtin seed": (
        lambda world: (
            world.set("seed", {"checkpoint": "builtin"}),
            world.set("train", {"sequence_length": 3000, "batch_tokens": 6000}),
        ),
        ("seed.builtin", "batch_tokens (8192)", "sequence_length (3000)"),
    ),
}
DATA: dict[str, tuple[Break, tuple[str, ...]]] = {
    "missing file": (setting("domains.math.data", ["data/maht.jsonl"]), ("domains.math.data", "'math.jsonl'")),
    "missing folder": (setting("domains.math.data", ["dat/x.jsonl"]), ("domains.math.data", "nor does", "dat")),
    "glob of nothing": (setting("domains.math.data", ["data/*.parquet"]), ("domains.math.data", "no file matches")),
    "folder of nothing": (
        lambda world: ((world.root / "e").mkdir(), (world.root / "e/x.md").touch(),
                       world.set("domains.math.data", ["e"])),
        ("domains.math.data", "/e ", ".jsonl", "x.md"),
    ),
    "unknown kind": (setting("domains.math.data", ["seed/model.safetensors"]), ("model.safe", "no format", ".jsonl")),
    "glob of unknown kinds": (setting("domains.math.data", ["seed/*.safe*"]), ("no format", "model.safetensors")),
    "a config as data": (setting("domains.math.data", ["seed/config.json"]), ("config.json", "no usable columns")),
    "an array with a broken record": (raw(b'[{"text": "a"}, {"txt": 1}]', "m.json"), ("m.json: record 2", "txt")),
    "half an array": (raw(b'[{"text": "a"}, ', "m.json"), ("m.json:", "data.on_bad_line: skip")),
    "unknown builtin": (setting("domains.math.data", ["builtin:maths"]), ("builtin:maths", "'math'")),
    "data of a builtin seed": (setting("seed", {"checkpoint": "builtin", "data": ["no.txt"]}), ("seed.data", "no.txt")),
    "unknown user": (setting("domains.math.data", ["~nobody-here/x.jsonl"]), ("domains.math.data", "~nobody-here")),
    "endless path": (setting("domains.math.data", ["x" * 5000]), ("domains.math.data", "too long")),
    "named twice": (setting("domains.math.data", ["data/math.jsonl", "data/m*.jsonl"]), ("twice", "data/m*.jsonl")),
    "trained on and held out": (setting("domains.math.valid", ["data/math.jsonl"]), ("`data`", "`valid`")),
    "missing valid": (setting("domains.math.valid", ["data/v.jsonl"]), ("domains.math.valid", "v.jsonl")),
    "no documents": (raw(b""), ("tokens:math", "0 documents", "1 files")),
    "blank lines only": (raw(b"\n  \n\n"), ("tokens:math", "0 documents")),
    "empty documents only": (rows({"text": ""}, {"text": " \n"}), ("tokens:math", "2 empty")),
    "one document": (rows({"text": "all there is " * 20}), ("tokens:math", "1 documents", "1 held out")),
    "the same document twice": (rows(*[{"text": "again and again " * 20}] * 2), ("tokens:math", "2 documents")),
    "shorter than one sequence": (rows({"text": "abc"}, {"text": "xyz"}), ("tokens:math", "tokens", "17", "shorter")),
    "empty valid": (
        lambda world: ((world.root / "data/v.txt").write_text(" \n"), world.set("domains.math.valid", ["data/v.txt"])),
        ("tokens:math", "1 empty", "hold out", "`valid`"),
    ),
    "other columns": (rows({"body": "x", "id": 1}), ("math.jsonl:1", "body, id", "text; messages; prompt and comp")),
    "text is a number": (rows({"text": 5}), ("math.jsonl:1", "text must be text", "int")),
    "text is nothing": (rows({"text": None}), ("math.jsonl:1", "NoneType")),
    "a record is a list": (rows(["x"]), ("math.jsonl:1", "list")),
    "a message without content": (rows({"messages": [{"role": "user"}]}), ("math.jsonl:1", "content", "found role")),
    "content in parts": (rows({"messages": [{"role": "user", "content": []}]}), ("content must be text", "list")),
    "messages in text": (rows({"messages": "hi"}), ("math.jsonl:1", "messages must be a list")),
    "broken JSON": (raw(GOOD * 2 + b'{"text": "\n'), ("math.jsonl:3", "data.on_bad_line: skip")),
    "endless nesting": (raw(GOOD + b"[" * 200_000 + b"\n"), ("math.jsonl:2", "recursion")),
    "an endless number": (raw(GOOD + b'{"text": ' + b"1" * 5000 + b"}\n"), ("math.jsonl:2", "digit")),
    "half a surrogate pair": (raw(GOOD + b'{"text": "\\ud800"}\n'), ("math.jsonl:2", "surrogates")),
    "a NUL": (raw(GOOD + b'{"text": "a\\u0000b"}\n'), ("math.jsonl:2", "NUL")),
    "a NUL in plain text": (raw(b"fine\nn\0t\n", "m.txt"), ("m.txt:2", "NUL")),
    "Latin-1": (raw(GOOD + b'{"text": "caf\xe9"}\n'), ("math.jsonl:2", "utf-8")),
    "Latin-1 in plain text": (raw(b"fine\ncaf\xe9\n", "m.txt"), ("m.txt:2", "utf-8")),
    "UTF-16": (raw("a text".encode("utf-16"), "m.txt"), ("m.txt:1", "utf-8")),
    "no gzip": (raw(b"plain", "m.jsonl.gz"), ("m.jsonl.gz", "Fetch it again")),
    "half a gzip": (raw(gzip.compress(GOOD * 999)[:80], "m.jsonl.gz"), ("m.jsonl.gz", "Truncated", "Fetch it again")),
    "half an xz": (raw(b"\xfd7zXZ\0\0\4", "m.txt.xz"), ("m.txt.xz", "Fetch it again")),
    "no Parquet": (raw(b"PAR1 but no more", "m.parquet"), ("m.parquet", "Parquet", "row 0")),
    "a packed Parquet": (raw(gzip.compress(b"PAR1"), "m.parquet.gz"), ("m.parquet.gz", "no format", ".parquet")),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_work_is_refused_with_its_place_and_the_remedy(world: World, case: str) -> None:
    do, words = RECIPES[case]
    do(world)
    refused(world.write(), world.runs, 2, words)


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used_is_refused_with_file_and_line(world: World, case: str) -> None:
    do, words = DATA[case]
    do(world)
    refused(world.write(), world.runs, 2, words)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("train.learning_rat=1", ("train.learning_rat:", "'learning_rate'")),
        ("domains.maths.tokens=5", ("domains.maths", "`data`")),
        ("name.x=1", ("--set name.x", "name is a value")),
        ("name.x.y=1", ("--set name.x.y", "name is a value")),
        ("train", ("--set 'train'", "a.b=value")),
        ("=1", ("--set", "a.b=value")),
        ("train..seed=1", ("--set 'train..seed=1'", "empty")),
        ("train.seed=[1", ("--set train.seed", "YAML")),
        ("train.seed=", ("train.seed:", "None")),
    ],
)
def test_a_bad_override_is_refused(world: World, option: str, words: tuple[str, ...]) -> None:
    refused(world.write(), world.runs, 2, words, "--set", option)


def test_several_mistakes_are_told_at_once(world: World) -> None:
    world.set("train.lr", 1)
    world.set("seed.chekpoint", "x")
    said = refused(world.write(), world.runs, 2, ("train.lr:", "seed.chekpoint:"))
    assert len(said.strip().splitlines()) == 2


def test_a_run_directory_that_cannot_be_written_is_told_before_any_work(world: World) -> None:
    (world.root / "file").write_text("x")
    world.set("run.directory", str(world.root / "file" / "runs"))
    refused(world.write(), world.runs, 5, ("run.directory", "file", "Choose another"))


def test_a_domain_must_fill_one_sequence_and_the_token_after_it_to_the_very_token(world: World) -> None:
    text = "the quick brown fox and what it did"
    write_jsonl(world.math, [{"text": text}])
    (world.root / "data" / "valid.txt").write_text("held out")
    world.set("domains.math.valid", ["data/valid.txt"])
    number = len(next(Encoder(load_tokenizer(world.seed), "all").encode([parse({"text": text})]))[0])
    world.set("train", {"sequence_length": number - 1, "batch_tokens": number - 1})
    world.examine()
    world.set("train", {"sequence_length": number, "batch_tokens": number})
    refused(world.write(), world.runs, 2, ("tokens:math", f"{number} tokens to train on", f"takes {number + 1}"))


def test_a_conversation_that_cannot_be_written_is_refused_wherever_it_stands(world: World) -> None:
    talk = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a number of some kind"}]
    rows = [{"messages": [*talk, {"role": "user", "content": str(n)}]} for n in range(300)]
    write_jsonl(world.math, [*rows, {"messages": [{**talk[0], "name": "Ada"}, talk[1]]}])
    refused(world.write(), world.runs, 2, ("math.jsonl:301", "name of a message", "data.ignore"))
    world.set("data.ignore", ["name"])
    world.examine()


def test_bad_lines_are_left_out_where_the_recipe_says_so(world: World) -> None:
    with world.math.open("ab") as file:
        file.write(b'{"text": "\n\xff\n{"txt": 1}\n')
    world.set("data.on_bad_line", "skip")
    world.examine()


def test_a_process_of_its_own_ends_with_the_code_and_the_sentence_alone(world: World) -> None:
    world.set("domains.math.data", ["nowhere.jsonl"])
    command = [sys.executable, "-m", "btx", "run", str(world.write())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("btx: domains.math.data")
    assert len(done.stderr.splitlines()) == 1
    assert not world.runs.exists()
