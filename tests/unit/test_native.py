"""The meaning of config.json: which keys a stock model reads, which are bookkeeping, which decide the outputs."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from btx.checkpoints.token_map import DECIDING
from btx.checkpoints.validate import read_config
from btx.errors import ArtifactError
from btx.events import Event, Warned
from btx.export.portable import UNBALANCED, notes, portable_config
from btx.models.families import DENSE, MOE
from btx.models.native import (
    ACTING,
    SPELLINGS,
    bookkeeping,
    declared,
)
from btx.models.target import class_name, moe_config, warnings_of
from btx.steps.branch import check_expert
from tests.support.merges import load, logits, merge
from tests.support.mixtures import moe
from tests.support.models import FAMILIES, config_of, save_model
from tests.support.world import World, edit_json, refused

CACHES = {
    "sliding_window",
    "layer_types",
    "attention_chunk_size",
    "number_of_conv_states",
}  # read for the KV cache, not for logits
HARMLESS = {  # looked up by shared code: names of loading, of other kinds of model, or of outputs
    "auto_map", "quantization_config", "name_or_path", "gradient_checkpointing", "output_attentions",
    "is_heterogeneous", "sub_configs", "base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan",
    "base_model_tp_plan", "output_router_logits", "serialize_explicit_per_layer_config", "vision_aspect_ratio",
    "vision_feature_layer", "vision_feature_select_strategy",
}  # fmt: skip

SMOLLM2 = {  # the keys of published checkpoints that no dense class declares
    "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 5000.0,
    "torch_dtype": "float32", "transformers_version": "4.42.3",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}, "dtype": "q4"},
}  # fmt: skip
LLAMA32 = {
    "_name_or_path": "meta-llama/x", "unsloth_fixed": True, "unsloth_version": "2025.1", "mlp_bias": False,
    "attention_bias": False, "pretraining_tp": 2, "rope_theta": 5000.0, "_attn_implementation_autoset": True,
    "eos_token_id": [0, 1],
}  # fmt: skip
QWEN25 = {
    "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1, "use_mrope": False,
    "attention_dropout": 0.0, "rope_theta": 5000.0, "model_max_length": 4096, "tokenizer_class": "Qwen2Tokenizer",
}  # fmt: skip
DUMPED = {
    "temperature": 0.7, "max_length": 20, "pruned_heads": {"0": [1]}, "is_decoder": False, "tie_encoder_decoder": False,
    "torchscript": False, "finetuning_task": "x", "gguf": {"file": "x"}, "quantization_config": None, "auto_map": {},
    "num_labels": 2, "problem_type": None, "neftune_noise_alpha": 5, "_flash_attn_2_enabled": False,
    "router_jitter_noise": 0.5, "output_router_logits": True, "num_experts_per_tok": 7, "router_aux_loss_coef": 9.0,
    "mlp_only_layers": [0], "qkv_bias": False, "norm_topk_prob": False,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_reads_no_undeclared_key_that_is_not_known_here(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = config_of(family), set()
    read = PreTrainedConfig.__getattribute__

    def note(self: Any, name: str) -> Any:
        seen.add(name)
        return read(self, name)

    monkeypatch.setattr(PreTrainedConfig, "__getattribute__", note)
    for attention in ("eager", *([] if family == "granite_swa" else ["sdpa"])):  # which has sinks, and eager alone
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids, use_cache=False)
        model(input_ids=ids)
    monkeypatch.undo()
    fields = {f for f in seen if f.isidentifier() and not f.startswith("_")}
    base = {f for f in fields if callable(getattr(PreTrainedConfig, f, None))} | set(PreTrainedConfig().to_dict())
    found = fields - declared(config) - base - {*DENSE[family].carried}
    assert "rope_parameters" in seen
    assert found <= CACHES | HARMLESS | SPELLINGS | ACTING.keys() | {"is_encoder_decoder", "model_type"}


@pytest.mark.parametrize(("family", "more"), [("llama", SMOLLM2), ("llama", LLAMA32), ("qwen2", QWEN25)])
def test_the_configs_of_published_checkpoints_are_taken_and_their_bookkeeping_is_named(
    tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    known = {"rope_scaling", "rope_theta", "torch_dtype", "transformers_version", "_name_or_path"}
    told = " ".join(warnings_of({**config_of(family).to_dict(), **more}, "seed", sees_images=False))
    unread = more.keys() - declared(config_of(family)) - known
    assert all(key in told for key in unread)
    assert not any(key in told.split("has", 1)[1] for key in more.keys() - unread if key != "torch_dtype")
    assert unread or not told


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [SMOLLM2, LLAMA32, DUMPED, {"sliding_window": 4}], ids=["smol", "llama", "all", "win"])
def test_bookkeeping_changes_no_logit_of_the_mixture(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    """Not even where the MoE class declares a field of that name."""
    seed = save_model(tmp_path / "seed", config_of(family))
    wanted = logits(load(seed))
    fields = declared(config_of(family)) | {"rope_theta", "rope_scaling"}
    edit_json(seed / "config.json", **{k: v for k, v in more.items() if k not in fields})
    made = merge(tmp_path / "moe", [seed, seed], top_k=2)
    torch.testing.assert_close(logits(load(made)), wanted, atol=1e-5, rtol=0)
    config = read_config(made)
    assert not config.get("router_jitter_noise")
    assert not config.get("output_router_logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_asks_no_trainer_for_a_balance_loss(family: str) -> None:
    found = moe_config(config_of(family).to_dict(), experts=2, top_k=1, width=48, where="seed").to_dict()
    has = "router_aux_loss_coef" in found  # some classes have no such loss
    assert not found.get("router_aux_loss_coef")
    assert not found.get("output_router_logits")
    assert (UNBALANCED in notes(found, "published", Path("nowhere"))) == has
    assert (UNBALANCED in notes(found, "fused", Path("nowhere"))) == has
    assert UNBALANCED not in notes(config_of(family).to_dict(), "published", Path("nowhere"))


def test_nor_does_one_with_attention_experts_nor_one_that_said_otherwise() -> None:
    dense = config_of("llama", num_key_value_heads=4).to_dict()
    found = moe_config(dense, experts=2, top_k=1, width=48, where="seed", attention=True).to_dict()
    assert found["aux_loss_coef"] == 0.0
    said = portable_config({**found, "aux_loss_coef": 0.5, "output_router_logits": True})
    assert (said["aux_loss_coef"], said["output_router_logits"]) == (0.0, False)


@pytest.mark.parametrize("layers", [None, ["full_attention"] * 2, ["sliding_attention", "full_attention"]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_of_the_type_that_transformers_reads_it_as(
    tmp_path: Path, family: str, layers: list[str] | None
) -> None:
    config = {**config_of(family).to_dict(), "layer_types": layers}
    (tmp_path / "config.json").write_text(json.dumps(config if layers else config_of(family).to_dict()))
    assert read_config(tmp_path)["model_type"] == AutoConfig.from_pretrained(tmp_path).model_type


def test_a_mistral_with_layer_types_is_refused_as_what_it_is_read_as(world: World) -> None:
    for folder in (world.seed, world.law):
        save_model(folder, config_of("mistral"))
    world.examine()
    edit_json(world.law / "config.json", layer_types=["full_attention"] * 2)
    refused(world.write(), world.runs, 3, ("law", "model_type: seed 'mistral', expert 'ministral'"))
    edit_json(world.seed / "config.json", layer_types=["full_attention"] * 2)
    refused(world.write(), world.runs, 3, ("family ministral", "layer_types", "sliding_window: null"))
    for folder in (world.seed, world.law):
        edit_json(folder / "config.json", layer_types=None)
    world.examine()


ACTS = {
    "is_causal": [False, None, 0], "per_layer_config": [{"0": {"hidden_size": 3}}], "text_config": [{}, {"a": 1}],
    "decoder": [{}], "generator": [{}], "kv_sharing_modes": [["x"]], "attribute_map": [{"hidden_size": "x"}],
    "to_dict": [1], "text_encoder": [{}],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in ACTS.items() for v in values], ids=str)
def test_an_undeclared_key_that_acts_is_refused_by_name(key: str, value: Any) -> None:
    config = {**config_of("llama").to_dict(), key: value}
    with pytest.raises(ArtifactError, match=rf"seed.*{key}"):
        bookkeeping(config, "seed")


@pytest.mark.parametrize("more", [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}])
def test_what_a_config_asks_of_outputs_is_not_passed_on(tmp_path: Path, more: dict[str, Any]) -> None:
    from btx.models import model
    from btx.recipe.settings import RunSettings

    seed = save_model(tmp_path / "seed", config_of("llama"))
    edit_json(seed / "config.json", **more)
    where = RunSettings(device="cpu")
    for folder in (seed, merge(tmp_path / "moe", [seed, seed], top_k=2)):
        found = model.load(folder, where=where)(input_ids=torch.arange(9)[None])
        assert found.attentions is None
        assert found.hidden_states is None


def test_is_causal_acts_indeed() -> None:
    """The oracle of the row above: stock logits differ."""
    torch.manual_seed(0)
    a = AutoModelForCausalLM.from_config(config_of("llama")).eval()
    b = AutoModelForCausalLM.from_config(config_of("llama", is_causal=False)).eval()
    b.load_state_dict(a.state_dict())
    assert (logits(a) - logits(b)).abs().max() > 1e-3
    assert bookkeeping({**config_of("llama").to_dict(), "is_causal": True}, "seed") == ["is_causal"]


@pytest.mark.parametrize(
    ("family", "key"), [("llama", "mlp_bias"), ("llama", "attention_bias"), ("granite", "mlp_bias")]
)
def test_a_declared_field_that_the_mixture_cannot_hold_stays_refused(world: World, family: str, key: str) -> None:
    for folder in (world.seed, world.law):
        save_model(folder, config_of(family, **{key: True}))
    refused(world.write(), world.runs, 3, (key, "True", "does not support"))


def test_a_seed_and_an_expert_with_bookkeeping_are_taken_and_said(world: World) -> None:
    for folder, key in ((world.seed, "is_llama_config"), (world.law, "unsloth_version")):
        edit_json(folder / "config.json", **{key: "x"})
    world.examine()
    from btx.cli.main import graph_of

    steps = graph_of(world.write(), ()).steps
    told: list[Event] = []
    for label in ("branch", "branch:given"):
        steps[label].build(told.append)
    said = [event.text for event in told if isinstance(event, Warned)]
    assert len(said) == 2
    assert "is_llama_config" in said[0]
    assert "unsloth_version" in said[1]
    assert "the expert of domain law" in said[1]


def test_btx_plan_says_so_too(world: World) -> None:
    from click.testing import CliRunner

    from btx.cli.main import main

    edit_json(world.seed / "config.json", is_llama_config=True)
    edit_json(world.law / "config.json", unsloth_version="x")
    result = CliRunner().invoke(main, ["plan", str(world.write())])
    assert result.exit_code == 0, result.output
    assert "Warning: " in result.output
    assert "is_llama_config" in result.output
    assert "unsloth_version" in result.output
    edit_json(world.law / "config.json", model_type="gpt2")
    assert "Traceback" not in CliRunner().invoke(main, ["plan", str(world.write())]).output


def test_btx_moe_says_so_too(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    made = merge(tmp_path / "moe", [seed, seed], top_k=1)
    edit_json(seed / "config.json", is_llama_config=True)
    said = moe("replace", made, seed, "--name", "1", out=tmp_path / "out")
    assert "warning: the expert 1" in said
    assert "is_llama_config" in said


@pytest.mark.parametrize("kind", sorted(MOE))
def test_the_class_of_a_config_is_the_one_that_transformers_makes_of_it(kind: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(kind)
    assert getattr(transformers, class_name(config)) is transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def test_of_a_config_the_loading_of_a_tokenizer_reads_what_the_key_of_its_map_holds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    config, read = LlamaConfig(), set[str]()
    stated = {f.name for f in fields(LlamaConfig)} | {*DECIDING}
    plain = LlamaConfig.__getattribute__

    def traced(self: Any, name: str) -> Any:
        read.add(name)
        return plain(self, name)

    monkeypatch.setattr(LlamaConfig, "__getattribute__", traced)
    AutoTokenizer.from_pretrained(str(world.seed), config=config, local_files_only=True)
    assert "model_type" in read & stated <= {*DECIDING}


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_expert_with_a_chat_template_of_its_own_is_said(world: World, where: str) -> None:
    def put(folder: Path, template: str) -> None:
        if where.endswith(".jinja"):
            (folder / where).write_text(template)
        else:
            edit_json(folder / where, chat_template=template)

    put(world.seed, "{{ messages }}")
    put(world.law, "{{ messages }}")
    assert check_expert(world.seed, world.law, "law")["warnings"] == []
    put(world.law, "{{ messages }}!")
    (said,) = check_expert(world.seed, world.law, "law")["warnings"]
    assert "a chat template of its own" in said
