"""Which tokenizers give the same ids: everything that decides ids counts, formatting does not; and equivalent files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.token_map import (
    carry_tokenizer,
    load_beside,
    require_carried,
    same_files,
    token_map,
    tokenizer_digest,
)
from btx.checkpoints.validate import read_config
from btx.data.packed import load_tokenizer
from btx.errors import ArtifactError
from btx.merge.vocabulary import added_tokens
from btx.recipe.settings import ExportSettings
from btx.steps.export import write_model
from tests.support.merges import merge
from tests.support.mixtures import moe
from tests.support.models import config_of, save_model
from tests.support.world import World, edit_json, refused

Change = Callable[[Any], Any]
TEXTS = ("two plus three", " The  quick\nbrown Fox", "<|end|>x <|end|> y", "éàü ﬁ Ⅷ", "return a+b  # 12345", "")


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """A pico Llama with its tokenizer."""
    return save_model(tmp_path / "seed", config_of("llama"))


def changed(folder: Path, change: Change, out: Path) -> Path:
    """A copy of a folder with another tokenizer.json."""
    shutil.copytree(folder, out)
    data = json.loads((out / "tokenizer.json").read_text())
    change(data)
    (out / "tokenizer.json").write_text(json.dumps(data))
    return out


def put(*path: str | int, value: Any) -> Change:
    """Set a place of nested JSON."""

    def do(data: Any) -> None:
        for part in path[:-1]:
            data = data[part]
        data[path[-1]] = value

    return do


def swap(data: Any) -> None:
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


SPLIT = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
}
DECIDES: dict[str, Change] = {
    "a normalizer": put("normalizer", value={"type": "Lowercase"}),
    "another normal form": put("normalizer", value={"type": "NFKC"}),
    "a pre-tokenizer more": put("pre_tokenizer", value={"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}),
    "a space in front": put("pre_tokenizer", "add_prefix_space", value=True),
    "no splitting": put("pre_tokenizer", "use_regex", value=False),
    "a start mark": put("post_processor", value=TEMPLATE),
    "two tokens exchanged": swap,
    "a merge less": lambda d: d["model"]["merges"].pop(),
    "merges in another order": lambda d: d["model"]["merges"].reverse(),
    "byte fallback": put("model", "byte_fallback", value=True),
    "merges ignored": put("model", "ignore_merges", value=True),
    "an unknown token": put("model", "unk_token", value="a"),
    "dropout": put("model", "dropout", value=0.5),
    "another mark": put("added_tokens", 0, "content", value="<|x|>"),
    "a mark that eats spaces": put("added_tokens", 0, "lstrip", value=True),
    "spaces behind too": put("added_tokens", 0, "rstrip", value=True),
    "a mark between words alone": put("added_tokens", 0, "single_word", value=True),
}
SPELLING: dict[str, Change] = {
    "an added token that tokenizer_config.json names": put("added_tokens", value=[]),
    "nothing": lambda d: None,
    "padding of a trainer": put(
        "padding",
        value={"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<|end|>"},
    ),
    "truncation of a trainer": put(
        "truncation", value={"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    ),
    "merges of the other spelling": lambda d: d["model"].update(
        merges=[" ".join(m) if isinstance(m, list) else m.split(" ") for m in d["model"]["merges"]]
    ),
    "vocabulary in another order": lambda d: d["model"].update(vocab=dict(reversed(d["model"]["vocab"].items()))),
    "dropout of zero": put("model", "dropout", value=0.0),
    "an empty prefix": put("model", "continuing_subword_prefix", value=""),
    "a sequence of one": lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [d["pre_tokenizer"]]}),
    "an empty sequence": put("normalizer", value={"type": "Sequence", "normalizers": []}),
    "offsets": put("post_processor", value=BYTES),
    "another decoder": put("decoder", value=None),
}  # fmt: skip


@pytest.mark.parametrize("case", DECIDES)
def test_what_decides_ids_is_another_tokenizer(tmp_path: Path, seed: Path, case: str) -> None:
    other = changed(seed, DECIDES[case], tmp_path / "other")
    assert tokenizer_digest(other) != tokenizer_digest(seed)
    with pytest.raises(ArtifactError, match="the expert has another tokenizer than the seed"):
        added_tokens(seed, other, "the expert")


@pytest.mark.parametrize("case", SPELLING)
def test_another_spelling_is_the_same_tokenizer(tmp_path: Path, seed: Path, case: str) -> None:
    other = changed(seed, SPELLING[case], tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(other) == tokenizer_digest(seed)
    assert added_tokens(seed, other, "the expert") == []
    one, two = load_tokenizer(seed), load_tokenizer(other)
    assert [one(t)["input_ids"] for t in TEXTS] == [two(t)["input_ids"] for t in TEXTS]


def test_a_tokenizer_that_transformers_saved_again_is_the_same(tmp_path: Path, seed: Path) -> None:
    other = Path(shutil.copytree(seed, tmp_path / "other"))
    tokenizer = load_tokenizer(other)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    tokenizer("a", truncation=True, max_length=4, padding="max_length")
    tokenizer.save_pretrained(other)
    assert tokenizer_digest(other) == tokenizer_digest(seed)


def test_the_same_files_are_not_loaded(tmp_path: Path, seed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(seed, tmp_path / "other"))
    changed_config = Path(shutil.copytree(seed, tmp_path / "changed"))
    (changed_config / "tokenizer_config.json").write_text("{}")
    assert not same_files(seed, changed_config)
    edit_json(changed_config / "config.json", model_type="qwen2")
    (changed_config / "tokenizer_config.json").write_bytes((seed / "tokenizer_config.json").read_bytes())
    assert not same_files(seed, changed_config)
    monkeypatch.setattr("btx.checkpoints.token_map.load_beside", None)
    assert added_tokens(seed, other, "the expert") == []


def test_a_tokenizer_is_loaded_once_a_content_and_config_wherever_it_lies(
    tmp_path: Path, seed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []

    def load(folder: Path, beside: Any = None) -> Any:
        loaded.append(folder)
        return load_beside(folder, beside)

    monkeypatch.setattr("btx.checkpoints.token_map._KNOWN", {})
    monkeypatch.setattr("btx.checkpoints.token_map.load_beside", load)
    other = Path(shutil.copytree(seed, tmp_path / "other"))
    first = tokenizer_digest(seed)
    assert tokenizer_digest(other) == tokenizer_digest(seed, read_config(seed)) == first
    assert loaded == [seed]
    edit_json(other / "config.json", model_type="qwen2")
    tokenizer_digest(other)
    changed(seed, lambda data: data["model"].update(ignore_merges=True), tmp_path / "changed")
    assert tokenizer_digest(tmp_path / "changed") != first
    assert loaded == [seed, other, tmp_path / "changed"]


@pytest.mark.parametrize("case", ["a normalizer", "a pre-tokenizer more", "a start mark", "byte fallback"])
def test_an_expert_with_another_tokenizer_is_refused_by_what_differs(world: World, case: str) -> None:
    other = changed(world.law, DECIDES[case], world.root / "other")
    shutil.rmtree(world.law)
    other.rename(world.law)
    part = {"a normalizer": "normalizer", "a start mark": "post_processor", "byte fallback": "options"}
    refused(world.write(), world.runs, 3, ("law", "another tokenizer", part.get(case, "pre_tokenizer")))


def test_btx_moe_refuses_it_too(tmp_path: Path, seed: Path) -> None:
    made = merge(tmp_path / "moe", [seed, seed], top_k=1)
    other = changed(seed, DECIDES["a normalizer"], tmp_path / "other")
    assert "another tokenizer" in moe("replace", made, other, "--name", "1", out=tmp_path / "out", code=3)
    moe("replace", made, changed(seed, SPELLING["offsets"], tmp_path / "same"), "--name", "1", out=tmp_path / "ok")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model": 5}', '{"model": {"merges": [5]}}', '{"model": {}, "added_tokens": [1]}', "[" * 10**5]
)
def test_a_broken_tokenizer_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is damaged.*Fetch the checkpoint again"):
        tokenizer_digest(tmp_path)


# ---- files that mean the same beside the Mixture of Experts ----


def slow(folder: Path, name: str) -> Path:
    """The folder's tokenizer as vocab.json and merges.txt, of a class by name."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("backend", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))
    return folder


def ids(folder: Path) -> list[list[int]]:
    """The ids of the texts."""
    tokenizer = load_tokenizer(folder)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_tokenizer_that_one_class_loads_and_another_not_goes_with_the_export(
    tmp_path: Path, family: str, name: str
) -> None:
    seed = slow(save_model(tmp_path / "seed", config_of(family)), name)
    wanted = ids(seed)
    made = merge(tmp_path / "moe", [seed, seed], top_k=1)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (made / file).unlink()
    carry_tokenizer(seed, made, seed)
    assert ids(made) == wanted
    first = {p.name: p.read_bytes() for p in made.iterdir() if p.suffix == ".json"}
    carry_tokenizer(seed, made, seed)
    assert {p.name: p.read_bytes() for p in made.iterdir() if p.suffix == ".json"} == first
    out = tmp_path / "export"
    out.mkdir()
    write_model(made, out, ExportSettings())
    assert ids(out) == wanted
    assert Checkpoint(out).digest()


def test_such_a_seed_is_accepted_at_the_start_and_one_that_does_not_load_is_refused(world: World) -> None:
    for folder in (world.seed, world.law):
        slow(folder, "GPT2Tokenizer")
    world.examine()
    for folder in (world.seed, world.law):
        edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    refused(world.write(), world.runs, 3, ("tokenizer", "seed", "cannot be loaded"))


def test_files_that_mean_the_same_are_carried_byte_for_byte(tmp_path: Path, seed: Path) -> None:
    (seed / "tokenizer.json").write_text((seed / "tokenizer.json").read_text() + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "mixtral"}')
    carry_tokenizer(seed, out, seed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (seed / name).read_bytes()


def test_a_tokenizer_that_nothing_can_carry_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, seed: Path
) -> None:
    real = token_map

    def other(folder: Path, beside: Any = None) -> Any:
        found = copy.deepcopy(real(folder, beside))
        return {**found, "normalizer": str(folder)} if "scratch" in str(folder) or beside is None else found

    monkeypatch.setattr("btx.checkpoints.token_map.token_map", other)
    with pytest.raises(ArtifactError, match=r"other ids with the model type mixtral.*than with llama"):
        require_carried(seed, "mixtral")


def test_the_class_follows_the_model_that_it_is_loaded_beside(seed: Path) -> None:
    slow(seed, "GPT2Tokenizer")
    assert type(load_beside(seed, read_config(seed))).__name__ == "GPT2Tokenizer"
    with pytest.raises(ArtifactError, match="beside a mixtral"):
        load_beside(seed, {"model_type": "mixtral"})
