"""The evaluation: equal models are scored once, all in one precision, on the recipe's split."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.data.packed import Encoder, Tokens, load_tokenizer, write_tokens
from btx.data.split import Split
from btx.errors import RecipeError
from btx.export.card import finetuning_note
from btx.graph.artifact import publish
from btx.probes.contract import Found
from btx.recipe.settings import DataSettings, EvaluateSettings, MeasureSettings, RoutingRule, RunSettings
from btx.steps.evaluate import Evaluate
from btx.steps.measure import Measure
from btx.steps.model import ModelStep
from tests.support.models import tokenizer_into
from tests.support.project import write_project
from tests.support.world import write_jsonl


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokens folder with documents in both splits."""
    folder = tmp_path_factory.mktemp("texts")
    tokenizer_into(folder)
    write_jsonl(folder / "data.jsonl", [{"text": f"document {n}"} for n in range(200)])
    settings = DataSettings()
    split = Split([str(folder / "data.jsonl")], [], settings)
    write_tokens(folder, split, settings=settings, encoder=Encoder(load_tokenizer(folder), "all"))
    return folder


RULE = RoutingRule(routing="top_k", experts_per_token=1, soft_first_layer=False)


def model(root: Path, name: str, digest: str) -> Any:
    """A step that has published something."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "experts.json").write_text('{"experts": ["a"]}')
    return SimpleNamespace(digest=digest, folder=folder)


def measure(
    texts: Path, root: Path, name: str, digest: str, *, rule: RoutingRule | None = None, **settings: Any
) -> Any:
    """A Measure step of a model, which only has a name."""
    return Measure.model_construct(
        model=model(root, name, digest), tokens={"d": SimpleNamespace(folder=texts, digest="texts")}, own={}, length=64,
        where=RunSettings(device="cpu"), name=name, settings=MeasureSettings(**settings), rule=rule, root=root,
        probe="bits_per_byte", probe_version=1, options={}, reference=None,
    )  # fmt: skip


def rows_of(nats: float, documents: list[Any]) -> list[dict[str, Any]]:
    """The same score of every document."""
    return [{"domain": "d", "document": n, "nats": nats} for n in range(len(documents))]


def published(step: Any) -> None:
    """Run a step and publish its result, as far as other steps read it."""
    step.__dict__["key"] = f"{step.name:0<64}"
    manifest: dict[str, Any] = {"step": step.label}
    publish(step.folder, lambda out: manifest.update(facts=step.run(out, out, lambda _event: None)), manifest)


def evaluation(texts: Path, measures: dict[str, Any], **settings: Any) -> Evaluate:
    """An Evaluate step over measurements."""
    return Evaluate.model_construct(
        measures=measures, others={}, tokens={"d": SimpleNamespace(folder=texts)}, where=RunSettings(device="cpu"),
        name=None, settings=EvaluateSettings(bootstrap=10, **settings),
    )  # fmt: skip


@pytest.mark.parametrize("side", ["test", "select"])
def test_models_of_the_same_content_are_scored_once_on_the_side_asked_for(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: Any
) -> None:
    digests = {"seed": "x", "expert-a": "y", "average": "x", "merged": "z", "finetuned": "z", "other": "z"}
    calls: list[tuple[str, bool]] = []
    wanted = Tokens(texts).valid(10**9, side)

    def score(self: Measure, documents: Any) -> Found:
        calls.append((self.model.folder.name, self.rule is not None))
        assert [ids.tolist() for ids, _ in documents["d"]] == [ids.tolist() for ids, _ in wanted]
        nats = float(ord(digests[self.model.folder.name]))
        return Found({}, rows_of(nats, documents["d"]), {"routing": {"d": {}}} if self.rule else {})

    monkeypatch.setattr(Measure, "_measure", score)
    rules = {"merged": RULE, "finetuned": RULE, "other": RULE.model_copy(update={"experts_per_token": 2})}
    measures = {name: measure(texts, tmp_path, name, digest, rule=rules.get(name), split=side)
                for name, digest in digests.items()}  # fmt: skip
    for one in measures.values():
        published(one)
    assert calls == [("seed", False), ("expert-a", False), ("merged", True), ("other", True)]
    evaluation(texts, measures, split=side).run(tmp_path, tmp_path, lambda _event: None)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["split"] == side
    assert results["bits_per_byte"]["average"] == results["bits_per_byte"]["seed"]
    assert results["bits_per_byte"]["seed"] != results["bits_per_byte"]["merged"]
    assert set(results["routing"]) == {"merged", "finetuned", "other"}
    assert results["experts"] == ["a"]
    assert results["held_out"]["d"]["sources"] == results["held_out"]["d"]["documents"] == len(wanted) >= 30


def test_few_documents_are_warned_of_and_none_is_refused(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measure, "_measure", lambda _self, documents: Found({}, rows_of(1.0, documents["d"])))
    said: list[Any] = []
    for count, name in ((20, "few"), (10**6, "many")):
        said.clear()
        one = measure(texts, tmp_path, name, "x", tokens=count)
        published(one)
        evaluation(texts, {"seed": one}, tokens=count).run(tmp_path, tmp_path, said.append)
        assert any("held-out source documents" in event.text for event in said) == (name == "few")
    (tmp_path / "tokens.json").write_text(json.dumps(
        {**json.loads((texts / "tokens.json").read_text()), "select": []}))  # fmt: skip
    for file in ("train.bin", "valid.bin"):
        (tmp_path / file).write_bytes((texts / file).read_bytes())
    with pytest.raises(RecipeError, match=r"domain d has no held-out document .*\(select\)"):
        measure(tmp_path, tmp_path, "none", "x", split="select").documents()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_all_models_of_a_report_are_loaded_in_the_precision_of_its_settings(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, dtype: torch.dtype
) -> None:
    """`auto` is resolved earlier, when the graph is built."""
    asked: list[torch.dtype] = []

    def load(_folder: Path, **how: Any) -> Any:
        asked.append(how["dtype"])
        return SimpleNamespace(to=lambda _device: SimpleNamespace(eval=lambda: None))

    monkeypatch.setattr("btx.models.model.load", load)
    one = measure(texts, tmp_path, "seed", "x", precision=precision)
    one.model.open = partial(ModelStep.open, one.model)
    one._measure({})
    assert asked == [dtype]


def test_automatic_precision_is_settled_when_the_graph_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(
        write_project(tmp_path),
        [*(f"{one}.precision=auto" for one in ("train", "finetune", "evaluate")), "dense={learning_rate: 1e-3}"],
    )
    for found in ("bf16", "fp32"):
        monkeypatch.setattr("btx.recipe.precision.automatic", lambda _device, found=found: found)
        graph = Graph(recipe, tmp_path)
        made = graph.recipe
        assert {made.train.precision, made.evaluate.precision, made.finetuning.precision} == {found}
        assert graph.steps["dense"].train.precision == found
    said = recipe.model_copy(update={"evaluate": EvaluateSettings(precision="fp32")})
    monkeypatch.setattr("btx.recipe.precision.automatic", lambda _device: "bf16")
    assert Graph(said, tmp_path).recipe.evaluate.precision == "fp32"


@pytest.mark.parametrize(("after", "warned"), [(2.0, True), (1.0, False)])
def test_a_finetuning_that_ends_worse_on_select_than_it_began_is_said(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float, warned: bool
) -> None:
    scores = {"merged": 1.5, "finetuned": after}

    def score(self: Measure, documents: Any) -> Found:
        bits = scores[self.model.folder.name]
        return Found({"d": {"bits_per_byte": bits}}, rows_of(bits, documents["d"]))

    monkeypatch.setattr(Measure, "_measure", score)
    measures = {name: measure(texts, tmp_path, name, name, split="select") for name in scores}
    for one in measures.values():
        published(one)
    said: list[Any] = []
    step = evaluation(texts, {"seed": measures["merged"]}, split="select").model_copy(update={"selected": measures})
    step.run(tmp_path, tmp_path, said.append)
    found = json.loads((tmp_path / "results.json").read_text())["finetuning"]
    assert found["mean"] == scores
    assert any("ended worse on select than it began" in event.text for event in said) == warned
    assert bool(finetuning_note({"finetuning": found})) == warned
