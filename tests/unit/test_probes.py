"""Probes: the folder listing is the registry, each is measured by itself, and an unsuitable model states the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.errors import RecipeError
from btx.models.opened import Opened, Stock
from btx.probes import kl_to_seed, passes, registry
from btx.probes.contract import Data, Found, Probe
from btx.probes.registry import ALWAYS, probes
from btx.report.console import probe_parts
from btx.report.figures import probe_tables
from tests.support import moe_models
from tests.support.models import config_of
from tests.support.project import write_project

CHANCE = np.random.default_rng(0)
DOCUMENTS = [(CHANCE.integers(1, 31, n), n) for n in (2, 5, 8, 9, 30)]


def test_every_probe_is_found_by_its_module() -> None:
    assert {ALWAYS, "kl_to_seed"} <= probes().keys()
    assert all(isinstance(probe, Probe) for probe in probes().values())


def net_of(seed: int) -> Opened:
    """A pico Llama."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return Stock(AutoModelForCausalLM.from_config(config_of("llama")).eval())


@pytest.mark.parametrize("length", [4, 100])
@pytest.mark.parametrize("batch_tokens", [1, 1000])
@pytest.mark.parametrize("logits", [300, 2**24])
def test_the_divergence_from_the_seed_is_that_of_the_definition(
    length: int, batch_tokens: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "LOGITS", logits)
    seed, model = net_of(0), net_of(1)
    data = Data({"d": DOCUMENTS}, length, batch_tokens)
    found = kl_to_seed.measure(model, seed, data, None)
    wanted = []
    for ids, _ in DOCUMENTS:
        total = 0.0
        for start in range(0, len(ids) - 1, length):
            window = torch.from_numpy(ids[start : start + length + 1][:-1][None])
            p, q = seed.log_probs(window).double(), model.log_probs(window).double()
            total += float((p.exp() * (p - q)).sum())
        wanted.append(total)
    assert [row["nats"] for row in found.rows] == pytest.approx(wanted, rel=1e-4)
    assert found.numbers["d"]["nats_per_token"] == pytest.approx(sum(wanted) / 49, rel=1e-4)
    same = kl_to_seed.measure(seed, seed, data, None)
    assert [row["nats"] for row in same.rows] == pytest.approx([0.0] * len(DOCUMENTS), abs=1e-4)


def graph_of(folder: Path, *overrides: str) -> Graph:
    """The graph of a project with three domains."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        write_project(folder)
    return Graph(load_recipe(recipe, [f"run.directory={folder}/runs", *overrides]), folder)


def test_a_further_probe_measures_every_model_anew_and_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    plain = graph_of(tmp_path).steps
    more = graph_of(tmp_path, "probes={kl_to_seed: {}}").steps
    new = more.keys() - plain.keys()
    assert new == {f"measure:kl_to_seed:{label.removeprefix('measure:')}"
                   for label in plain if label.startswith("measure:") and ":select:" not in label}  # fmt: skip
    assert {label for label in plain if plain[label].key != more[label].key} == {"evaluate", "export", "report"}
    with pytest.raises(RecipeError, match=r"probes\.kl_to_sed: there is no such key; did you mean 'kl_to_seed'"):
        graph_of(tmp_path, "probes={kl_to_sed: {}}")


def test_a_model_without_what_a_probe_needs_has_no_answer_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Found:
        raise AssertionError

    needy = Probe(never, needs=frozenset({"routing"}))
    step = graph_of(tmp_path, "probes={kl_to_seed: {}}").steps["measure:kl_to_seed:seed"]
    monkeypatch.setattr(registry, "probes", lambda: {"kl_to_seed": needy})
    assert step._measure({}).missing == "the model gives no routing"  # type: ignore[attr-defined]
    routed = Stock(moe_models.build("mixtral").eval())
    assert not needy.needs <= routed.capabilities  # a routing rule must be installed on it


def test_numbers_and_reasons_stand_in_one_table() -> None:
    found = {"seed": {"math": {"kl": 0.0}, "code": {"kl": 0.25}}, "other": {"not available": "no routing"}}
    head, rows = probe_tables({"probes": {"p": found}})["p"]
    assert head == ["model", "math: kl", "code: kl"]
    assert rows == [["seed", "0", "0.25"], ["other", "not available: no routing"]]
    table, reason = probe_parts(head, rows)
    assert (table.row_count, reason) == (1, "  other: not available: no routing")
    assert not probe_tables({})


def test_a_table_that_would_be_too_wide_is_turned() -> None:
    many = {f"n{n}": n / 4 for n in range(9)}
    found = {"seed": {"math": many}, "other": {"math": many}, "btm": {"not available": "no routing"}}
    head, rows = probe_tables({"probes": {"p": found}})["p"]
    assert head == ["number", "seed", "other"]
    assert rows[1] == ["math: n1", "0.25", "0.25"]
    assert len(rows) == 9 + 1
    assert rows[-1] == ["btm: not available: no routing"]


def test_a_table_too_wide_both_ways_is_one_for_each_domain() -> None:
    numbers = {domain: {f"n{n}": float(n) for n in range(5)} for domain in ("math", "code")}
    found: Any = {f"m{n}": numbers for n in range(9)} | {"composed": {"not available": "no hidden states"}}
    tables = probe_tables({"probes": {"lens": found}})
    assert [*tables] == ["lens: math", "lens: code"]
    head, rows = tables["lens: code"]
    assert head == ["model", "n0", "n1", "n2", "n3", "n4"]
    assert rows[0] == ["m0", "0", "1", "2", "3", "4"]
    assert rows[-1] == ["composed", "not available: no hidden states"]
