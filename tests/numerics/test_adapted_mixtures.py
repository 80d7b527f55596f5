"""Adapters of mixtures: stacked experts included, their merge is the live model, here and as users of peft do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from btx.checkpoints.reader import opened
from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.errors import RecipeError
from btx.recipe.joint_settings import AdapterRule
from btx.recipe.settings import FinetuneSettings, RunSettings
from btx.steps.finetune import Balanced
from btx.training.adapters import Held
from btx.training.loop import Loop
from tests.support import moe_models
from tests.support.command import btx
from tests.support.loops import SETTINGS, stream
from tests.support.project import write_project

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's own calls
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning"),  # and its own patterns
]
FAMILIES = (*moe_models.FAMILIES, "granitemoe")
WHERE = RunSettings(device="cpu", threads=1)
IDS = torch.randint(1, 31, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(net: Any) -> Any:
    """Raw logits."""
    with torch.inference_mode():
        return net.eval()(input_ids=IDS).logits


def moe_loop(net: Any, folder: Path, held: Held, precision: str = "fp32") -> Loop:
    """The finetuning of a mixture by an adapter."""
    settings = FinetuneSettings(**{**SETTINGS, "precision": precision, "learning_rate": 2e-2}, tokens=512)
    hook = Balanced(net, settings, "x", lambda _e: None, list("abcd"))
    held.prepare_mixture(net)
    return Loop(net, stream(folder / "data"), settings, where=WHERE, work=folder / "work", label="x",
                emit=lambda _e: None, hook=hook)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_merged_is_what_was_trained_experts_and_routers_included(
    tmp_path: Path, family: str, precision: str
) -> None:
    net = moe_models.build(family, vocab_size=300)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    held = Held(AdapterRule(options={}), "finetune.adapter")
    moe_loop(net, tmp_path, held, precision).run()
    live = logits(net)
    plain = held.merge(net)
    assert torch.allclose(logits(plain), live, atol=1e-4)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {part for part in ("experts", "gate", "router", "self_attn", "embed_tokens", "norm")
             if any(part in name for name in moved)}  # fmt: skip
    assert {"experts", "self_attn", "router" if family == "granitemoe" else "gate"} <= parts
    assert not parts & {"embed_tokens", "norm"}


def test_a_method_that_cannot_adapt_experts_says_so() -> None:
    net = moe_models.build("mixtral", vocab_size=300)
    with pytest.raises(RecipeError, match=r"finetune.adapter.method: oft cannot adapt experts"):
        Held(AdapterRule(method="oft"), "finetune.adapter").prepare_mixture(net)
    Held(AdapterRule(method="oft", options={"target_modules": ["q_proj"], "oft_block_size": 4}), "x").prepare_mixture(
        net
    )
    live = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert {"oft" in name or ".gate." in name for name in live} == {True}


def test_a_run_finetunes_by_an_adapter_and_publishes_a_mixture(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    said = ["finetune.adapter={options: {r: 4}}", "finetune.learning_rate=1e-2"]
    flags = [part for one in said for part in ("--set", one)]
    btx("run", "recipe.yaml", *flags, "--until", "finetune", cwd=tmp_path)
    graph = Graph(load_recipe(recipe, [*said, f"run.directory={tmp_path / 'runs'}"]), tmp_path)
    merged, finetuned = (graph.steps[name].folder for name in ("merge", "finetune"))
    with opened(merged) as one, opened(finetuned) as other:
        assert one.entries.keys() == other.entries.keys()
        moved = {name for name in one.entries if not torch.equal(one.read(name), other.read(name))}
    assert any(".experts." in name for name in moved)
    assert not any("norm" in name or "embed" in name for name in moved)
    plain = Graph(load_recipe(recipe, [*said[1:], f"run.directory={tmp_path / 'runs'}"]), tmp_path)
    assert plain.steps["merge"].key == graph.steps["merge"].key
    assert plain.steps["finetune"].key != graph.steps["finetune"].key
    refused = btx("plan", "recipe.yaml", *flags, "--set", "finetune.moments=experts", cwd=tmp_path, code=2)
    assert "an adapter has no moments" in refused.stderr
    targets = "finetune.adapter={options: {target_modules: [q_proj, w3]}}"  # w3: as the hub's own Mixtral calls it
    refused = btx("run", "recipe.yaml", "--set", targets, cwd=tmp_path, code=2)
    assert "finetune.adapter.options: no module of the model is called 'w3' (target_modules)" in refused.stderr


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, as its users get it."""
    folder = tmp_path_factory.mktemp("export")
    write_project(folder)
    btx("export", "recipe.yaml", cwd=folder)
    return folder / "runs/pico/export"


def test_users_of_peft_adapt_an_export_experts_included(export: Path, tmp_path: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = get_peft_model(net, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32),
                                      tmp_path / "adapter")  # fmt: skip
    assert torch.allclose(logits(again), live, atol=1e-6)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(logits(whole), live, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    moved = whole.model.layers[0].mlp.experts.down_proj - plain.model.layers[0].mlp.experts.down_proj
    assert moved.abs().max() > 1e-4
    assert json.loads((export / "config.json").read_text())["router_aux_loss_coef"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl's own
def test_users_of_trl_finetune_an_export_by_lora(export: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": f"two plus {n} is {n + 2}"} for n in range(16)])
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, max_length=32,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model=str(export), args=settings, train_dataset=data, peft_config=config)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(one["loss"])) for one in trainer.state.log_history if "loss" in one)
    live = logits(trainer.model)
    plain = trainer.model.merge_and_unload()
    assert torch.allclose(logits(plain), live, atol=1e-4)
    before = AutoModelForCausalLM.from_pretrained(export).state_dict()
    moved = {
        name for name, tensor in plain.state_dict().items() if not torch.equal(tensor.float(), before[name].float())
    }
    assert any("experts" in name for name in moved)
