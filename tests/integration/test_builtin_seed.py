"""The embedded default at pico size: tokenizer, seed and split are made as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btx import builtin
from btx.corpus import held_out
from btx.pipeline import Graph
from btx.recipe import load_recipe
from btx.steps.tokenizer import Tokenizer
from btx.steps.tokens import TokensStep
from btx.tokens import Tokens, load_tokenizer

RECIPE = """\
name: pico
seed: {checkpoint: builtin, data: ["builtin:math"], builtin: {vocab_size: 400}}
domains:
  math: {data: ["builtin:math"], tokens: 4k}
train: {sequence_length: 64, batch_tokens: 1024}
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A graph whose tokenizer and tokens are made."""
    folder = tmp_path_factory.mktemp("builtin")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    made = Graph(load_recipe(folder / "recipe.yaml", [f"run.directory={folder}/runs"]), folder)
    for label in ("tokenizer", "tokens:math"):
        made.steps[label].build(lambda _event: None)
    return made


def test_the_tokenizer_has_the_size_and_the_end_mark_and_loses_nothing(graph: Graph) -> None:
    tokenizer = load_tokenizer(graph.steps["tokenizer"].folder)
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == "<|endoftext|>"
    text = "Grüße 12×7\n\tdef f(): pass 漢"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_the_same_when_it_is_made_again(graph: Graph, tmp_path: Path) -> None:
    step = graph.steps["tokenizer"]
    assert isinstance(step, Tokenizer)
    step.run(tmp_path, tmp_path, lambda _event: None)
    assert (tmp_path / "tokenizer.json").read_bytes() == (step.folder / "tokenizer.json").read_bytes()


def test_no_held_out_document_is_trained_on(graph: Graph) -> None:
    step = graph.steps["tokens:math"]
    assert isinstance(step, TokensStep)
    tokenizer, tokens = load_tokenizer(step.tokenizer.folder), Tokens(step.folder)
    trained = tokenizer.decode(tokens.train.tolist())
    kept = [d for d in builtin.documents("math") if held_out(d, 0.05)]
    assert len(kept) == json.loads((step.folder / "tokens.json").read_text())["valid_documents"] > 50
    assert not any(document in trained for document in kept)
    assert next(d for d in builtin.documents("math") if not held_out(d, 0.05)) in trained
