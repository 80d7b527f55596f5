"""Supervised finetuning on instructions, in the same tables as all else, and what its controls show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from btx.cli.main import graph_of, main
from btx.cli.plan import rows
from btx.compare.checks import check_arms
from btx.compare.rounds import Rounds
from btx.conversions.registry import load_recipe, open_model
from btx.data.encoder import load_tokenizer
from btx.data.instructions import instruction_of
from btx.data.packed import Tokens
from btx.recipe.settings import RunSettings
from btx.steps.solve import Solve
from tests.support.instructions import items
from tests.support.models import config_of, save_model
from tests.support.world import World, refused, setting, write_jsonl

CONTROLS = ["simplified", "delusive", "empty", "shuffled"]
SFT = {"data": ["data/train.jsonl"], "tokens": 128, "sequence_length": 32, "batch_tokens": 64, "precision": "fp32"}
TASK = {"kind": "label", "file": "data/test.jsonl", "max_new_tokens": 3}


def world_of(root: Path, *, trained: int = 200, **more: Any) -> World:
    """A world with instructions to train on and a task that asks some of them."""
    world = World(root)
    train = items(trained, 0)
    write_jsonl(root / "data" / "train.jsonl", train)
    write_jsonl(root / "data" / "test.jsonl", [*items(20, 1, numbers=range(100, 200)), *train[:5]])
    world.set("domains.law", {"data": ["data/law.jsonl"], "tokens": 64})
    world.set("sft", {**SFT, **more})
    world.set("tasks", {"rules": dict(TASK)})
    world.set("run.threads", 1)
    return world


@pytest.mark.slow
def test_it_is_trained_on_answers_alone_measured_and_reported(tmp_path: Path) -> None:
    world = world_of(tmp_path, controls=["empty"])
    done = CliRunner().invoke(main, ["run", str(world.write())])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    steps = graph_of(world.write(), ()).steps
    results = json.loads((steps["report"].folder / "results.json").read_text(encoding="utf-8"))
    assert {"sft", "sft-empty"} < set(results["bits_per_byte"])
    found = results["tasks"]["rules"]["models"]
    assert {"compliance", "accuracy_of_compliant", "chance"} < set(found["sft"])
    assert "% labels" in (steps["report"].folder / "report.html").read_text(encoding="utf-8")
    assert results["tasks"]["rules"]["contamination"]["instructions"]["found"] == 0
    _answers_alone(steps["instructions"].folder, world.seed)
    with open_model(steps["sft"].folder, where=RunSettings(device="cpu", threads=1)) as model:  # loads again
        assert torch.isfinite(model.log_probs(torch.tensor([[1, 2, 3]]))).all()
    planned = {row.label: row.tokens for row in rows(load_recipe(world.write(), []), tmp_path)}
    assert planned["sft"] == planned["sft:empty"] == 128
    again = CliRunner().invoke(main, ["run", str(world.write())])
    assert "Everything is done already" in again.output


def _answers_alone(folder: Path, seed: Path) -> None:
    """A loss on the answers and the ends of items, and on nothing else; none of the task's items is there."""
    tokens, tokenizer = Tokens(folder), load_tokenizer(seed)
    assert tokens.mask is not None
    ends = np.flatnonzero(tokens.train == tokenizer.eos_token_id)
    assert tokens.mask[ends[1::2]].all()  # each item has one before, as its start, or one after
    texts = tokenizer.decode(tokens.train.astype(int).tolist()).split("<|end|>")
    asked = (folder.parents[3] / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = {instruction_of(json.loads(line)).prompt for line in asked}
    assert len(texts) > 100
    assert not [text for text in texts if text.rpartition(" ")[0] in prompts]
    learned = tokenizer.decode(tokens.train[np.array(tokens.mask) == 1].astype(int).tolist()).split("<|end|>")
    assert {text.strip() for text in learned} - {""} <= set("xyzuvw")


def test_a_control_shares_the_split_and_re_keys_its_own_tokens_alone(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    first = graph_of(world.write(), ()).steps
    world.set("sft.seed", 5)
    assert world.key("instructions") == first["instructions"].key  # nothing is drawn
    world.set("sft.control", "shuffled")
    drawn = world.key("instructions")
    world.set("sft.seed", 6)
    assert len({world.key("instructions"), drawn, first["instructions"].key}) == 3
    assert world.key("train:math") == first["train:math"].key


def test_controls_are_arms_of_a_comparison(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.set("seed", {"checkpoint": "seed"})
    arms = {"sft": {}, **{name: {"conversion": "sft", "set": {"sft.control": name}} for name in CONTROLS}}
    world.set("compare", {"arms": arms, "control": "sft", "seeds": [0], "rates": [1e-3, 2e-3], "budgets": [128]})
    recipe = load_recipe(world.write(), [])
    check_arms(Rounds(recipe, tmp_path))


@pytest.mark.parametrize(("key", "value", "words"), [
    ("sft.data", ["data/none.jsonl"], ("sft.data", "does not exist")),
    ("sft.data", ["data/math.jsonl"], ("math.jsonl:1", "output")),
    ("sft.control", "random", ("sft.control",)),
    ("sft.controls", ["empty", "original"], ("sft.controls", "once")),
    ("sft.chat", True, ("chat template", "sft.chat")),
    ("sft.sequence_length", 5, ("sft", "batch_tokens")),
    ("sft.sequence_length", 4096, ("sft.sequence_length",)),
    ("tasks.rules.prompt", "{input}", ("`prompt`", "kind label")),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, key: str, value: Any, words: tuple[str, ...]
) -> None:
    world = world_of(tmp_path)
    setting(key, value)(world)
    if key == "sft.sequence_length" and value > 4000:
        setting("sft.batch_tokens", value)(world)
    refused(world.write(), world.runs, 2, words)


# ---- the effect ----


def scores(root: Path, seed: int) -> dict[str, dict[str, Any]]:
    """The numbers of each control on unseen items with the original instruction, from random weights of this seed."""
    world = world_of(root, trained=3000, controls=CONTROLS, tokens=200_000, sequence_length=64, batch_tokens=1024,
                     learning_rate=3e-3, seed=seed)  # fmt: skip
    shutil.rmtree(world.seed)
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    save_model(world.seed, config_of("llama", **wide), seed=seed)
    write_jsonl(root / "data" / "train.jsonl", items(3000, seed))
    write_jsonl(root / "data" / "test.jsonl", items(120, 100 + seed, numbers=range(100, 200)))
    graph = graph_of(world.write(), ())
    found = {}
    for name in ("sft", *(f"sft-{control}" for control in CONTROLS)):
        solve = graph.steps[f"task:rules:{name}"]
        for step in graph.needed([f"task:rules:{name}"]):
            step.build(lambda _event: None)
        assert isinstance(solve, Solve)
        found[name] = solve.numbers()
    return found


@pytest.mark.slow
def test_the_label_space_alone_gives_compliance_and_the_instruction_alone_accuracy(tmp_path: Path) -> None:
    """As in the paper: what is right without the instruction's meaning is compliance times chance."""
    torch.set_num_threads(1)
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        found = scores(tmp_path / str(seed), seed)
        chance = found["sft"]["chance"]
        assert found["sft"]["accuracy"] > 0.9
        for control in ("sft-simplified", "sft-delusive"):
            assert found[control]["compliance"] > 0.9
        assert abs(found["sft-simplified"]["accuracy_of_compliant"] - chance) < 0.15
        assert found["sft-delusive"]["accuracy_of_compliant"] < chance + 0.1
        assert found["sft-empty"]["compliance"] < 0.8  # it cannot know which labels there are
        for control in ("sft-empty", "sft-shuffled"):
            assert found[control]["accuracy"] < 0.4
