"""The embedded default at pico size: tokenizer, seed and held-out split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.data import builtin
from btx.data.heldout import SIDES, Side
from btx.data.packed import Tokens, load_tokenizer
from btx.steps.tokenizer import Tokenizer
from btx.steps.tokens import TokensStep

DEMO = Path(__file__).resolve().parents[2] / "pipelines" / "demo.yaml"
RECIPE = """\
name: pico
seed: {checkpoint: builtin, data: ["builtin:math"], builtin: {vocab_size: 400}}
domains:
  math: {data: ["builtin:math"], tokens: 4k}
train: {sequence_length: 64, batch_tokens: 1024}
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A graph whose tokenizer and tokens steps are done."""
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
    trained = tokenizer.decode(tokens.train.tolist()).split("<|endoftext|>")
    held = [
        tokenizer.decode(ids[1:].tolist()) for side in SIDES for ids, _ in tokens.valid(10**9, side)
    ]  # fmt: skip
    facts = json.loads((step.folder / "tokens.json").read_text())
    assert len(held) == facts["valid_documents"] + facts["select_documents"] > 200
    assert not {*held} & {*trained}
    cut = [text.encode()[:4096].decode() for text in builtin.documents("math")]
    assert {*held} < {*cut}
    assert len(trained) - 1 + len(held) == len(cut)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The graph of the demo recipe, its texts tokenised."""
    folder = tmp_path_factory.mktemp("demo")
    made = Graph(load_recipe(DEMO, [f"run.directory={folder}/runs"]), DEMO.parent)
    for label in ("tokenizer", "tokens:math", "tokens:code", "tokens:prose"):
        made.steps[label].build(lambda _event: None)
    return made


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", builtin.NAMES)
def test_the_demo_is_judged_on_thirty_source_documents_a_domain(demo: Graph, name: str, side: Side) -> None:
    tokens = Tokens(demo.steps[f"tokens:{name}"].folder)
    scored = tokens.valid(demo.recipe.evaluate.tokens, side)
    assert len({*tokens.sources(len(scored), side)}) >= 30
    assert max(size for _, size in scored) <= 4096


def test_the_seed_of_the_demo_is_trained_on_nothing_that_a_domain_holds_out(demo: Graph) -> None:
    steps = {name: demo.steps[f"tokens:{name}"] for name in ("seed", *builtin.NAMES)}
    splits = {name: step.split() for name, step in steps.items() if isinstance(step, TokensStep)}
    trained = {document.text for document in splits["seed"].train()}
    tokenizer = demo.steps["tokenizer"]
    assert isinstance(tokenizer, Tokenizer)
    assert {document.text for document in tokenizer.split().train()} == trained
    for name in builtin.NAMES:
        own = {document.text for document in splits[name].train()}
        for text in builtin.documents(name):
            assert text in own or text not in trained
        for held in (*splits[name].test, *splits[name].select):
            assert not any(text.startswith(held.document.text) for text in own)
