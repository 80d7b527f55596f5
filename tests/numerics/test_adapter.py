"""LoRA adapters merged into dense experts: peft's own merge is the oracle; what is more than LoRA is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from btx.checkpoints.reader import opened
from btx.errors import ArtifactError
from btx.graph.artifact import write_json
from btx.merge.adapter import WEIGHTS, Adapter, is_adapter
from btx.merge.lora_config import CONFIG
from tests.support.adapters import ours, train_adapter
from tests.support.command import btx, results
from tests.support.models import config_of, save_model
from tests.support.project import write_project
from tests.support.world import edit_json


@pytest.mark.filterwarnings("ignore")  # raised by imports of peft
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"], "r": 1},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"model.layers.1.mlp.up_proj": 3, "v_proj": 2}},
        {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    ],
    ids=str,
)
def test_peft_itself_merges_to_the_same(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    own = {"phi3": {"q_proj": "qkv_proj"}, "lfm2": {"down_proj": "w2"}}.get(family, {})  # names of its projections
    more = {**more} | {
        key: [own.get(n, n) for n in more[key]] for key in ("target_modules", "modules_to_save") if key in more
    }
    wanted = train_adapter(seed, tmp_path / "adapter", **more)
    assert is_adapter(tmp_path / "adapter")
    found, before = ours(seed, tmp_path / "adapter", tmp_path / "out"), load_file(seed / "model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-5, msg=name)
    changed = sum(not torch.equal(found[n], before[n]) for n in found)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    kinds = tuple(f".{kind}.weight" for kind in (*config["target_modules"], *(config["modules_to_save"] or ())))
    assert changed == sum(name.endswith(kinds) for name in before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [3, 100, 5000])
def test_blocks_of_any_size_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    train_adapter(seed, tmp_path / "adapter")
    whole = ours(seed, tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr("btx.merge.adapter.BLOCK", block)
    found = ours(seed, tmp_path / "adapter", tmp_path / "cut")
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=1e-6, msg=name)


def weights(change: Any) -> Any:
    """Change the adapter's tensors."""

    def do(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return do


def config(**changes: Any) -> Any:
    """Change adapter_config.json."""
    return lambda folder: edit_json(folder / CONFIG, **changes)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG = {
    "dora without lengths": (config(use_dora=True), "use_dora: True.*magnitudes are none.*merge_and_unload"),
    "bias": (config(bias="all"), "bias: 'all'"),
    "pissa": (config(init_lora_weights="pissa"), "init_lora_weights: 'pissa'"),
    "another kind": (config(peft_type="IA3"), "peft_type: 'IA3'"),
    "another kind without alpha": (config(peft_type="IA3", lora_alpha=None), "peft_type: 'IA3'"),
    "no kind": (config(peft_type=None), "damaged"),
    "alpha in words": (config(lora_alpha="much"), "lora_alpha: 'much'"),
    "rank of nothing": (config(r=0), "has r: 0"),
    "a broken pattern": (config(alpha_pattern={"(": 2}), "alpha_pattern.*which is not a regular expression"),
    "a set of numbers": (config(target_modules=[1]), "target_modules.*another type"),
    "another rank": (config(r=5), "has r: 5, by which .* has rank 5, in the file 4"),
    "not selected": (config(target_modules=["q_proj"]), "target_modules: .*does not select model.layers.0.mlp"),
    "selected and excluded": (config(exclude_modules=["q_proj"]), "target_modules: .*does not select .*q_proj"),
    "layers of none": (config(layers_pattern="layers"), "layers_pattern: 'layers', which peft does not accept without"),
    "layers of a pattern": (
        config(target_modules=".*q_proj", layers_to_transform=[1]),
        "layers_to_transform.*beside target_modules",
    ),
    "another layer": (config(layers_to_transform=[1]), "does not select model.layers.0"),
    "saved, not there": (config(modules_to_save=["norm"]), "modules_to_save: .*norm.weight is not in"),
    "nothing targeted": (config(target_modules=None), "target_modules: None"),
    "a classifier": (config(task_type="SEQ_CLS"), "task_type: 'SEQ_CLS'"),
    "a start of its own": (config(init_lora_weights="mica"), "init_lora_weights: 'mica'"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "pickle.*save_pretrained"),
    "no config": (lambda folder: (folder / CONFIG).write_text("["), "damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "NaN": (weights(lambda t: t[A].fill_(torch.nan)), "lora_A.weight holds 128 NaN"),
    "no B": (weights(lambda t: t.pop(A.replace("lora_A", "lora_B"))), "lora_B none do not fit"),
    "another width": (weights(lambda t: t.update({A: torch.zeros(4, 31)})), r"lora_A \(4, 31\)"),
    "a stranger": (
        weights(lambda t: t.update({"base_model.model.x": torch.zeros(2)})),
        "nor, by name and shape, a weight of the seed",
    ),
    "no prefix": (
        weights(lambda t: t.update({"model.norm.weight": torch.zeros(32)})),
        "model.norm.weight is neither a LoRA factor",
    ),
    "an adapter's name inside": (
        weights(lambda t: t.update({A.replace("A.weight", "A.default.weight"): t.pop(A)})),
        "lora_A none and lora_B",
    ),
    "whole in the place of factors": (
        weights(
            lambda t: [
                t.pop(A),
                t.pop(A.replace("lora_A", "lora_B")),
                t.update({A.replace("lora_A.", ""): torch.zeros(32, 32)}),
            ]
        ),
        "target_modules: .*selects model.layers.0.self_attn.q_proj",
    ),
    "code": (lambda folder: (folder / "x.py").write_text(""), "runs no code"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_more_or_less_than_lora_is_refused(tmp_path: Path, case: str) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    train_adapter(seed, tmp_path / "adapter")
    do, words = WRONG[case]
    do(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=words):
        ours(seed, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_beside_the_adapter_must_be_the_seeds(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    train_adapter(seed, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(seed)
    tokenizer.save_pretrained(tmp_path / "adapter")
    ours(seed, tmp_path / "adapter", tmp_path / "out")
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with opened(seed) as base, pytest.raises(ArtifactError, match=r"other tokens than that of the seed.*Merge"):
        Adapter(tmp_path / "adapter").require_fit(base)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_with_an_adapter_as_an_expert(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    wanted = train_adapter(tmp_path / "seed", tmp_path / "lora")
    recipe.write_text(recipe.read_text().replace("train:", "  law: {checkpoint: lora}\ntrain:", 1))
    btx("run", "recipe.yaml", cwd=tmp_path)
    btx("check", "runs/pico/export", cwd=tmp_path)
    assert results(tmp_path)["experts"] == ["math", "code", "law", "seed"]
    merged = load_file(tmp_path / "runs/pico/merge/model.safetensors")
    down = merged["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    torch.testing.assert_close(down, wanted["model.layers.1.mlp.down_proj.weight"], atol=1e-6, rtol=1e-5)
    write_json(tmp_path / "lora" / CONFIG, {**json.loads((tmp_path / "lora" / CONFIG).read_text()), "use_qalora": True})
    assert "use_qalora" in btx("run", "recipe.yaml", cwd=tmp_path, code=3).stderr
