"""Adapters trained here: off they are the seed, on they are what loads again and what their merge computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe, open_model
from btx.errors import RecipeError
from btx.recipe.joint_settings import AdapterRule
from btx.recipe.settings import RunSettings, TrainSettings
from btx.training import adapters
from btx.training.adapters import Held
from btx.training.loop import Loop
from tests.support.command import btx
from tests.support.loops import SETTINGS, stop_after, stream, weights
from tests.support.models import FAMILIES, config_of
from tests.support.project import write_project

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own calls
IDS = torch.randint(1, 31, (2, 12), generator=torch.Generator().manual_seed(0))
WHERE = RunSettings(device="cpu", threads=1)
METHODS = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "dora": {"r": 4},
    "ia3": {},
    "oft": {"oft_block_size": 8},
    "loha": {"r": 4},
    "vera": {"r": 8},
}


def net_of(family: str = "llama") -> Any:
    """A pico model with fixed weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, attn_implementation="eager")).eval()


def logits(net: Any) -> Any:
    """Raw logits."""
    with torch.inference_mode():
        return net.eval()(input_ids=IDS).logits


def trained(net: Any, method: str, options: Any) -> Any:
    """peft's model over a network, moved by a few steps."""
    model = adapters.wrapped(net, adapters.config_of(method, options, "adapter"), "adapter")
    live = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=2e-2)
    net.train()
    for _ in range(4):
        net(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_off_it_is_the_seed_and_on_it_is_what_loads_again_and_what_is_merged(tmp_path: Path, method: str) -> None:
    net, plain = net_of(), logits(net_of())
    model = trained(net, method, METHODS[method])
    live = logits(net)
    assert (live - plain).abs().max() > 1e-3
    if method != "ia3":  # which peft folds into inputs, also where it is off
        with model.disable_adapter():
            assert torch.equal(logits(net), plain)
    adapters.save(model, tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(net_of(), tmp_path)), live, atol=1e-6)  # as its users do
    whole = adapters.merged(net_of(), tmp_path)
    assert torch.allclose(logits(whole), live, atol=1e-5)
    assert whole.state_dict().keys() == net_of().state_dict().keys()
    assert "/" not in (tmp_path / "adapter_config.json").read_text().replace("\\/", "")  # no path of this machine


@pytest.mark.parametrize("family", [*FAMILIES])
def test_lora_of_every_family_is_its_merge(tmp_path: Path, family: str) -> None:
    net = net_of(family)
    adapters.save(trained(net, "lora", {"r": 4}), tmp_path)
    assert torch.allclose(logits(adapters.merged(net_of(family), tmp_path)), logits(net), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("lorra", {}, r"adapter.method: peft has no 'lorra'; did you mean 'lora'"),
        ("lora", {"rank": 4}, r"adapter.options: LoraConfig has no 'rank'"),
        ("lora", {"r": 0}, r"adapter.*peft"),
        ("lora", {"target_modules": ["nothing"]}, r"adapter: peft cannot adapt this model so \(.*nothing"),
        ("prefix_tuning", {}, "learns parts of an input"),
        ("adalora", {"total_step": 10}, "has to be told of every step"),
        ("poly", {}, "peft cannot adapt this model so"),
    ],
)
def test_what_peft_cannot_do_is_refused_by_name(method: str, options: Any, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        adapters.wrapped(net_of(), adapters.config_of(method, options, "adapter"), "adapter")


def test_an_adapter_that_peft_saves_as_another_one_is_refused(tmp_path: Path) -> None:
    net = net_of()
    adapters.save(trained(net, "lora", {"r": 4}), tmp_path)
    adapters.require_saved(net_of(), tmp_path, adapters.probed(net), "adapter")
    with pytest.raises(RecipeError, match="another adapter than the one that was trained"):
        adapters.require_saved(net_of(), tmp_path, adapters.probed(net) + 0.01, "adapter")


def loop_of(folder: Path, work: str, method: str, precision: str) -> tuple[Loop, Held]:
    """The training of an adapter of a pico model."""
    net, made = net_of(), stream(folder / "data")
    torch.manual_seed(1)
    held = Held(AdapterRule(method=method, options={"r": 4}), "adapter")
    held.prepare(net, made)
    settings = TrainSettings(**{**SETTINGS, "precision": precision})
    loop = Loop(net, made, settings, where=WHERE.model_copy(update={"checkpoint_steps": 4}), work=folder / work,
                label="x", emit=lambda _e: None)  # fmt: skip
    return loop, held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path, method: str, precision: str) -> None:
    whole, held = loop_of(tmp_path, "a", method, precision)
    before = weights(whole)
    whole.run()
    stop_after(loop_of(tmp_path, "b", method, precision)[0], 5)
    again, other = loop_of(tmp_path, "b", method, precision)
    assert again.run().resumed_from == 4
    for n, one in enumerate((held, other)):
        one.publish(one.model.base_model.model, None, tmp_path / f"saved-{n}")
    files = [(tmp_path / f"saved-{n}" / "adapter_model.safetensors").read_bytes() for n in range(2)]
    assert files[0] == files[1]
    moved = {name for name, tensor in weights(whole).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)  # and nothing of the seed


def test_a_run_trains_an_adapter_that_loads_here_and_in_peft(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "seed").iterdir()}
    said = "adapter={method: dora, options: {r: 4}, tokens: 2048, learning_rate: 1e-2}"
    btx("run", "recipe.yaml", "--set", said, "--until", "adapter", cwd=tmp_path)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "seed").iterdir()}
    folder = Graph(load_recipe(recipe, [said, f"run.directory={tmp_path / 'runs'}"]), tmp_path).steps["adapter"].folder
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "seed"), folder).eval()
    with open_model(folder, where=WHERE) as model:
        assert torch.allclose(model.log_probs(IDS), logits(theirs).log_softmax(-1), atol=1e-5)
    with theirs.disable_adapter(), open_model(tmp_path / "seed", where=WHERE) as seed:
        assert torch.allclose(seed.log_probs(IDS), logits(theirs).log_softmax(-1), atol=1e-6)
