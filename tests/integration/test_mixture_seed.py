"""Runs whose seed is a mixture: its experts are trained on every domain and stand side by side in what is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import btx, results
from tests.support.models import save_model
from tests.support.project import write_project
from tests.support.shapes import sparse_config
from tests.support.world import edit_json, refused

ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
COUNT = 5


def test_every_model_keeps_its_routers_and_a_row_from_data_tells_models_apart(tmp_path: Path) -> None:
    write_project(tmp_path, mixture="mixtral")
    said = btx("run", "recipe.yaml", "--until", "finetune", "--set", "finetune.top_k=3", cwd=tmp_path).stderr
    assert "initialises the routers from activations" in said
    folder = tmp_path / "runs/pico"
    merged = load_file(folder / "merge/model.safetensors")
    own = [load_file(folder / one / "model.safetensors") for one in ("train-math", "train-code")]
    own.append(load_file(tmp_path / "seed/model.safetensors"))
    added = merged[ROUTER] - torch.cat([model[ROUTER] for model in own])
    added = added.view(3, COUNT, -1)
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-6, rtol=0)
    assert (added[0] - added[1]).abs().max() > 1e-3
    about = json.loads((folder / "finetune/experts.json").read_text())
    assert (about["own"], about["experts"][COUNT]) == ([COUNT, 2], "code.0")
    config = json.loads((folder / "finetune/config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3 * COUNT, 6)
    metrics = (folder / "finetune/logs/metrics.jsonl").read_text().splitlines()
    assert len(json.loads(metrics[-1])["load"][0]) == 3


def test_an_expert_that_is_another_mixture_is_refused_and_one_of_its_own_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_project(tmp_path, mixture="mixtral")
    recipe.write_text(recipe.read_text().replace("train:", "  law: {checkpoint: law}\ntrain:", 1))
    for changes, said in (
        ({"num_local_experts": 4}, "num_local_experts: seed 5, expert 4"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok: seed 2, expert 1"),
    ):
        save_model(tmp_path / "law", sparse_config("mixtral", **changes))
        refused(recipe, tmp_path / "runs", 3, [said])
    edit_json(tmp_path / "seed/config.json", num_local_experts=10**8)
    refused(recipe, tmp_path / "runs", 3, ["num_local_experts is 100000000, and model.layers.0", "is 5x32"])
    edit_json(tmp_path / "seed/config.json", num_local_experts=COUNT)
    save_model(tmp_path / "law", sparse_config("mixtral"), noise=0.01)
    found = load_file(tmp_path / "law/model.safetensors")
    btx("run", recipe, "--until", "merge", cwd=tmp_path)
    merged = load_file(tmp_path / "runs/pico/merge/model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    assert torch.equal(merged[name.format(2 * COUNT + 3)], found[name.format(3)])
    broken = {key: tensor for key, tensor in found.items() if key != name.format(3)}
    save_file(broken, tmp_path / "law/model.safetensors", {"format": "pt"})
    refused(recipe, tmp_path / "none", 3, [f"{name.format(3)} is missing"])


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ("finetune.routing=switch", "a token of the seed, which is a mixture, visits 2"),
        ("finetune.moments=experts", "was not tried on a seed that is a mixture"),
        ("merge.router=arrow", "merge.router: arrow applies to dense feed-forward blocks"),
        ("anchored={}", "the seed is a mixture. Leave it out"),
        ("merge.experts=blend", "merge.experts: blend applies to dense feed-forward blocks"),
    ],
)
def test_what_is_of_dense_seeds_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(write_project(tmp_path, mixture="mixtral"), tmp_path / "runs", 2, [said], "--set", sets)


def test_weights_that_add_up_to_less_need_the_experts_of_all_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_project(tmp_path, mixture="qwen2_moe whose weights add up to less than one")
    refused(recipe, tmp_path / "runs", 2, ["finetune.top_k is 2", "out of 3 models", "Set it to 3"])


@pytest.mark.slow
def test_they_are_trained_and_exported_as_they_are(tmp_path: Path) -> None:
    write_project(tmp_path, mixture="qwen2_moe whose weights add up to less than one")
    btx("run", "recipe.yaml", "--set", "finetune.top_k=3", cwd=tmp_path)
    btx("check", "runs/pico/export", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qwen3_moe", "ernie4_5_moe with shared experts", "lfm2_moe with a bias", "gemma4_moe", "granitemoe"]
)
def test_a_mixture_runs_whole_beside_other_conversions_and_its_export_checks(tmp_path: Path, name: str) -> None:
    write_project(tmp_path, mixture=name)
    sets = ["upcycle={}", "scratch={shape: moe}", "btm={}", "dense={}",
            "probes={weights: {}, token_routing: {}, knock_out: {}, drift: {}}"]  # fmt: skip
    btx("plan", "recipe.yaml", *(part for s in sets for part in ("--set", s)), cwd=tmp_path)
    btx("run", "recipe.yaml", *(part for s in sets for part in ("--set", s)), cwd=tmp_path)
    btx("check", "runs/pico/export", cwd=tmp_path)
    found = results(tmp_path)
    assert found["experts"] == ["math", "code", "seed"]
    assert found["bits_per_byte"]["finetuned"]["math"] < found["bits_per_byte"]["seed"]["math"]
    assert len(found["routing"]["finetuned"]["math"]["mean"]) == 3
    assert {"feed_forward", "attention"} <= found["probes"]["weights"]["merged"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        ["train.precision=bf16", "train.dtype=bf16", "train.trainable=ffn"],
        ["finetune.routing=soft", "finetune.balance.type=none"],
        ["finetune.balance.type=bias", "merge.router=random", "merge.copies={seed: 2}", "merge.reinitialize=0.2"],
        ["finetune.adapter={method: lora}", "merge.router=own", "train.gradient_checkpointing=true"],
        ["domains.math.expert={adapter: {method: lora, options: {r: 4}}}", "merge.shared=ties"],
    ],
    ids=" ".join,
)
def test_variants_of_mixtures_run_whole(tmp_path: Path, sets: list[str]) -> None:
    write_project(tmp_path, mixture="qwen3_moe")
    btx("run", "recipe.yaml", *(part for s in sets for part in ("--set", s)), cwd=tmp_path)
    btx("check", "runs/pico/export", cwd=tmp_path)
