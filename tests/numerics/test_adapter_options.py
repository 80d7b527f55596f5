"""Every option of peft's LoRA: the expert computes what peft's live model does, or the adapter is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from btx.checkpoints.reader import opened
from btx.errors import ArtifactError
from btx.graph.artifact import write_json
from btx.merge.adapter import WEIGHTS, Adapter
from btx.merge.lora_config import CONFIG, RECORDS, UNDERSTOOD, LoraOptions
from tests.support.adapters import EVERYWHERE, ours, train_adapter
from tests.support.merges import IDS
from tests.support.models import config_of, save_model

pytestmark = pytest.mark.filterwarnings("ignore")  # raised by imports of peft
peft = pytest.importorskip("peft")


def live(seed: Path, adapter: Path) -> torch.Tensor:
    """Logits of peft's own model, loaded from the files, unmerged."""
    base = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def dense(seed: Path, adapter: Path, out: Path) -> torch.Tensor:
    """Logits of the expert that btx makes."""
    ours(seed, adapter, out)
    (out / "config.json").write_bytes((seed / "config.json").read_bytes())
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def edit(folder: Path, **changes: Any) -> None:
    """Set options in adapter_config.json; None is written as null."""
    path = folder / CONFIG
    write_json(path, {**json.loads(path.read_text()), **changes})


def seed_in(folder: Path, family: str = "llama", **more: Any) -> Path:
    """A pico seed."""
    return save_model(folder / "seed", config_of(family, **more))


SAME: dict[str, dict[str, Any]] = {
    "plain": {},
    "r and alpha": {"r": 3, "lora_alpha": 5},
    "rank-stabilised": {"use_rslora": True, "r": 9},
    "rank-stabilised by pattern": {
        "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"mlp.up_proj": 40}
    },
    "DoRA": {"use_dora": True},
    "DoRA, rank-stabilised, by pattern": {
        "use_dora": True, "use_rslora": True, "rank_pattern": {"layers.1.*": 6}, "alpha_pattern": {"q_proj": 1}
    },
    "patterns that overlap, the wide one first": {"alpha_pattern": {".*_proj": 3, "q_proj": 50}},
    "patterns that overlap, the narrow one first": {"alpha_pattern": {"q_proj": 50, ".*_proj": 3}},
    "ranks that overlap": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 5, "v_.*": 3}},
    "a pattern of one layer": {"rank_pattern": {r"model\.layers\.1\..*": 7}, "alpha_pattern": {"1.mlp.down_proj": 99}},
    "a pattern that starts at the root": {"alpha_pattern": {"^model.layers.0.mlp.up_proj": 77}},
    "half a name is no name": {"alpha_pattern": {"proj": 99, "p_proj": 44, "1.self_attn": 33}},
    "targets as a pattern": {"target_modules": r".*\.layers\.[01]\.(self_attn|mlp)\.(q|up)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "all linear, written large": {"target_modules": "All-Linear"},
    "targets by whole names": {"target_modules": ["model.layers.1.mlp.up_proj", "v_proj"]},
    "some excluded": {"exclude_modules": ["model.layers.0.self_attn.q_proj", "up_proj"]},
    "excluded by a pattern": {"exclude_modules": r".*layers\.1.*"},
    "one layer": {"layers_to_transform": 1},
    "some layers": {"layers_to_transform": [0]},
    "layers under their name": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers under some name": {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "the head too": {"target_modules": ["q_proj", "lm_head"]},
    "norms whole": {"modules_to_save": ["norm"]},
    "embedding and head whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a layer whole": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "no start": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.5},
    "said to be inference": {"inference_mode": True},
    "a causal model": {"task_type": "CAUSAL_LM"},
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_an_adapter_computes_what_pefts_live_model_does(tmp_path: Path, case: str) -> None:
    seed, adapter = seed_in(tmp_path), tmp_path / "adapter"
    train_adapter(seed, adapter, **SAME[case])
    wanted = live(seed, adapter)
    plain = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)(input_ids=IDS).logits
    assert (wanted - plain).abs().max() > 1e-3  # else there would be no effect to see
    torch.testing.assert_close(dense(seed, adapter, tmp_path / "out"), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "granite"])
@pytest.mark.parametrize("more", [{"use_dora": True}, {"alpha_pattern": {"0.mlp.*": 9}}], ids=str)
def test_so_in_other_families(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    seed, adapter = seed_in(tmp_path, family), tmp_path / "adapter"
    train_adapter(seed, adapter, **more)
    torch.testing.assert_close(dense(seed, adapter, tmp_path / "out"), live(seed, adapter), atol=1e-5, rtol=1e-5)


REFUSED: dict[str, dict[str, Any]] = {  # that peft itself writes
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "init_lora_weights:": {"init_lora_weights": "olora"},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "task_type": {"task_type": "FEATURE_EXTRACTION"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    more, option = REFUSED[case], case.rstrip(":")
    seed = seed_in(tmp_path, "qwen2", tie_word_embeddings=False)  # which has biases
    train_adapter(seed, tmp_path / "adapter", **{"target_modules": ["q_proj", "k_proj"], **more})
    with opened(seed) as base, pytest.raises(ArtifactError, match=rf"has {option}: .*merge_and_unload"):
        Adapter(tmp_path / "adapter").require_fit(base)


@pytest.mark.parametrize("option", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_would_take_a_tied_head_off_its_embedding_is_refused(tmp_path: Path, option: str, whole: bool) -> None:
    seed = seed_in(tmp_path, tie_word_embeddings=True)
    more = {"modules_to_save": [option]} if whole else {"target_modules": ["q_proj", option]}
    train_adapter(seed, tmp_path / "adapter", **more)
    with opened(seed) as base, pytest.raises(ArtifactError, match=option):
        Adapter(tmp_path / "adapter").require_fit(base)


def test_factors_on_the_embedding_are_refused(tmp_path: Path) -> None:
    seed = seed_in(tmp_path)
    train_adapter(seed, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with opened(seed) as base, pytest.raises(ArtifactError, match=r"target_modules: .*factors on the embedding"):
        Adapter(tmp_path / "adapter").require_fit(base)


FIELDS = [field.name for field in dataclasses.fields(peft.LoraConfig)]


@pytest.mark.parametrize("option", [*FIELDS, "an_option_of_tomorrow"])
@pytest.mark.parametrize("value", [{"a": 1}, ["x"], True, 7, "x"], ids=str)
def test_no_option_acts_that_is_not_understood(tmp_path: Path, option: str, value: Any) -> None:
    """Even of a later peft: every option is implemented, is mere bookkeeping, or is refused by name."""
    write_json(tmp_path / CONFIG, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    LoraOptions(tmp_path)
    if option in UNDERSTOOD:
        return
    edit(tmp_path, **{option: value})
    if option in RECORDS:
        LoraOptions(tmp_path)
        return
    with pytest.raises(ArtifactError, match=f"has {option}: "):
        LoraOptions(tmp_path)


def test_what_peft_writes_by_default_is_taken(tmp_path: Path) -> None:
    peft.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    LoraOptions(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text()).keys() <= {*FIELDS}
    assert set(FIELDS) >= UNDERSTOOD | RECORDS


KINDS = {
    "target_modules": 5, "exclude_modules": 5, "layers_pattern": 5, "modules_to_save": "norm", "use_dora": "no",
    "layers_to_transform": ["1"], "rank_pattern": [1], "alpha_pattern": "x", "use_rslora": 1, "r": "4",
    "lora_alpha": None, "init_lora_weights": 1,
}  # fmt: skip


@pytest.mark.parametrize("option", KINDS)
def test_an_option_of_another_kind_is_refused(tmp_path: Path, option: str) -> None:
    write_json(tmp_path / CONFIG, {"peft_type": "LORA", "target_modules": ["q_proj"], option: KINDS[option]})
    with pytest.raises(ArtifactError, match=f"has {option}: "):
        LoraOptions(tmp_path)


@pytest.mark.parametrize("kind", [k.value for k in peft.PeftType if k.value != "LORA"])
def test_every_other_kind_of_adapter_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    write_json(tmp_path / CONFIG, {"peft_type": kind})
    with pytest.raises(ArtifactError, match=f"peft_type: '{kind}'"):
        LoraOptions(tmp_path)


def test_factors_that_peft_would_pass_over_are_refused(tmp_path: Path) -> None:
    """The live model has no module for them, so they would act only here."""
    seed, adapter = seed_in(tmp_path), tmp_path / "adapter"
    train_adapter(seed, adapter)
    edit(adapter, target_modules=["q_proj"])
    with pytest.raises(ArtifactError, match="target_modules"):
        dense(seed, adapter, tmp_path / "out")


def test_a_start_that_is_not_zero_needs_all_factors(tmp_path: Path) -> None:
    seed, adapter = seed_in(tmp_path), tmp_path / "adapter"
    train_adapter(seed, adapter)
    tensors = {n: t for n, t in load_file(adapter / WEIGHTS).items() if "layers.0.mlp.up_proj" not in n}
    save_file(tensors, adapter / WEIGHTS)
    torch.testing.assert_close(dense(seed, adapter, tmp_path / "out"), live(seed, adapter), atol=1e-5, rtol=1e-5)
    edit(adapter, init_lora_weights=False)
    with pytest.raises(ArtifactError, match=r"init_lora_weights.*no factors for model\.layers\.0\.mlp\.up_proj"):
        dense(seed, adapter, tmp_path / "again")


def test_rows_of_dora_do_not_depend_on_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, adapter = seed_in(tmp_path), tmp_path / "adapter"
    train_adapter(seed, adapter, use_dora=True, target_modules=EVERYWHERE)
    whole = dense(seed, adapter, tmp_path / "whole")
    monkeypatch.setattr("btx.merge.adapter.BLOCK", 70)
    torch.testing.assert_close(dense(seed, adapter, tmp_path / "cut"), whole, atol=1e-6, rtol=1e-6)
