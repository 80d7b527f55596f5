"""Whole runs of the other families, routings and kinds of domain: slow, run before an issue is resolved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from btx.data.packed import Tokens
from tests.support.command import FSDP, btx, results
from tests.support.models import FAMILIES, config_of, save_model
from tests.support.project import write_project
from tests.support.vocabularies import TOKENS, extended, plain

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama"])
def test_every_family_runs_whole_and_its_export_checks(tmp_path: Path, family: str) -> None:
    write_project(tmp_path, family=family)
    btx("run", "recipe.yaml", cwd=tmp_path)
    wanted = {
        "mistral": "MixtralForCausalLM", "qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM",
        "qwen3_5_text": "Qwen3_5MoeForCausalLM",
        "olmo2": "FlexOlmoForCausalLM", "granite": "GraniteMoeForCausalLM", "granite_swa": "GraniteMoeSWAForCausalLM",
        "phi3": "MixtralForCausalLM", "ernie4_5": "Ernie4_5_MoeForCausalLM", "cohere2": "Cohere2MoeForCausalLM",
        "hunyuan_v1_dense": "HunYuanMoEV1ForCausalLM", "lfm2": "Lfm2MoeForCausalLM",
        "gemma4_text": "Gemma4ForCausalLM",
    }[family]  # fmt: skip
    assert wanted in btx("check", "runs/pico/export", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "sets",
    [
        ["finetune.routing=switch", "finetune.balance.type=switch"],
        ["finetune.routing=soft", "finetune.balance.type=none"],
        ["finetune.routing=sample_top1", "finetune.trainable=router"],
        ["finetune.balance.type=transformers", "finetune.trainable=no_experts", "run.kernel=reference"],
        ["merge.experts=split", "merge.chunks=2", "finetune.top_k=4"],
        ["merge.experts=blend", "merge.include_seed=false"],
        ["merge.shared=ties", "merge.router=activations", "train.gradient_checkpointing=true"],
        ["merge.router=embeddings", "merge.experts=split"],
        ["merge.router=orthogonal", "merge.shared={method: mean, groups: {norms: linear}}"],
        ["data.loss_mask=completion", "train.dtype=bf16"],
    ],
    ids=" ".join,
)
def test_variants_run_whole_and_their_exports_check(tmp_path: Path, sets: list[str]) -> None:
    write_project(tmp_path)
    btx("run", "recipe.yaml", *(part for s in sets for part in ("--set", s)), cwd=tmp_path)
    btx("check", "runs/pico/export", cwd=tmp_path)
    table = results(tmp_path)["bits_per_byte"]
    assert table["finetuned"]["math"] < table["seed"]["math"]


def test_several_experts_of_a_domain_in_some_layers_beside_a_shared_one(tmp_path: Path) -> None:
    recipe = write_project(tmp_path, family="qwen2")
    save_model(tmp_path / "law", config_of("qwen2"), noise=0.01)
    text = recipe.read_text().replace("tokens: 3072}", "tokens: 3072, experts: 2}", 1)
    recipe.write_text(text.replace("train:", "  law: {checkpoint: [law, law]}\ntrain:", 1))
    sets = ["merge.layers=[1]", "merge.shared_expert=average", "merge.copies={seed: 2}", "merge.reinitialize=0.2",
            "merge.router=activations"]  # fmt: skip
    command = [recipe, *(part for s in sets for part in ("--set", s))]
    said = btx("train", *command, "--domain", "math", cwd=tmp_path)
    assert "train:math.0" in said.stdout
    assert "train:math.1" in said.stdout
    btx("train", *command, "--domain", "math.1", cwd=tmp_path)
    btx("run", *command, cwd=tmp_path)
    btx("check", "runs/pico/export", cwd=tmp_path)
    assert "train:math.1" in btx("plan", *command, cwd=tmp_path).stdout
    found = results(tmp_path)
    assert found["experts"] == ["math.0", "math.1", "code", "law.0", "law.1", "seed.0", "seed.1"]
    assert {"expert:math.0", "expert:math.1", "expert:law.1"} <= found["bits_per_byte"].keys()
    one, two = (load_file(tmp_path / f"runs/pico/train-math.{n}/model.safetensors") for n in "01")
    assert any((one[name] != two[name]).any() for name in one)
    assert json.loads((tmp_path / "runs/pico/export/config.json").read_text())["mlp_only_layers"] == [0]


def test_an_expert_trained_elsewhere_is_checked_and_merged_not_trained(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    save_model(tmp_path / "law", config_of("llama"), noise=0.01)
    text = recipe.read_text().replace("train:", "  law: {checkpoint: law}\ntrain:", 1)
    recipe.write_text(text)
    btx("run", "recipe.yaml", cwd=tmp_path)
    found = results(tmp_path)
    assert found["experts"] == ["math", "code", "law", "seed"]
    assert set(found["bits_per_byte"]["expert:law"]) == {"math", "code"}
    assert not (tmp_path / "runs/pico/train-law").exists()
    lineage = json.loads((tmp_path / "runs/pico/branch-given/lineage.json").read_text())
    assert lineage["law"]["cosine"] > 0.9


def test_two_sharded_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    """FSDP by accelerate's own configuration, with gloo: an expert and the finetuned model, states saved on the way."""
    recipe = write_project(tmp_path)
    (tmp_path / "two.yaml").write_text(FSDP)
    btx("run", recipe, "--until", "finetune", cwd=tmp_path)
    sets = ["run.directory=two", f"run.launch={tmp_path / 'two.yaml'}", "run.checkpoint_steps=2"]
    btx("run", recipe, "--until", "finetune", *(p for s in sets for p in ("--set", s)), cwd=tmp_path)
    for step in ("train-math", "finetune"):
        one, two = (tmp_path / d / "pico" / step for d in ("runs", "two"))
        assert json.loads((two / "btx.json").read_text())["facts"]["processes"] == 2
        first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
        assert first.keys() == second.keys()
        assert all((first[n] - second[n]).abs().max() < 1e-5 for n in first), step


@pytest.mark.parametrize(
    "sets",
    [
        ["finetune.routing=top_k", "merge.router=activations", "merge.copies={seed: 2}", "merge.reinitialize=0.1"],
        ["finetune.routing=switch", "finetune.trainable=router"],
        ["finetune.routing=soft", "finetune.balance.type=none", "merge.shared=ties"],
        ["finetune.routing=sample_top1", "finetune.trainable=no_experts"],
    ],
    ids=" ".join,
)
def test_attention_experts_run_whole(tmp_path: Path, sets: list[str]) -> None:
    recipe = write_project(tmp_path)
    save_model(tmp_path / "seed", config_of("llama", num_key_value_heads=4))
    command = [recipe, *(part for s in ["merge.experts=ffn+attention", *sets] for part in ("--set", s))]
    assert "merge" in btx("plan", *command, cwd=tmp_path).stdout
    btx("run", *command, cwd=tmp_path)
    assert "JetMoeForCausalLM" in btx("check", "runs/pico/export", cwd=tmp_path).stdout
    found = results(tmp_path)
    assert found["routing"]["finetuned"]["math"]["routers"] == ["0", "0 attention", "1", "1 attention"]
    assert found["bits_per_byte"]["finetuned"]["math"] < found["bits_per_byte"]["seed"]["math"]
    script = (
        "from transformers import pipeline; print(pipeline('text-generation', model='runs/pico/export')('two plus'))"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "two plus" in said.stdout


def test_an_expert_with_tokens_of_its_own_is_merged_by_token(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    for name in ("seed", "law"):
        plain(tmp_path / name, "llama")
    extended(tmp_path / "law", "llama", ["<law>", "</law>"], noise=0.01, special=False)  # a special one is read as text
    rows = [{"text": f"<law> no {n}: five plus two is seven </law> and so on for {n}"} for n in range(60)]
    (tmp_path / "corpora" / "law.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    law = '  law: {checkpoint: law, data: ["corpora/law.jsonl"]}\ntrain:'
    recipe.write_text(recipe.read_text().replace("train:", law, 1))
    btx("run", recipe, cwd=tmp_path)
    btx("check", "runs/pico/export", cwd=tmp_path)
    run = tmp_path / "runs/pico"
    config = json.loads((tmp_path / "runs/pico/export/config.json").read_text())
    assert config["vocab_size"] == TOKENS + 2
    lineage = json.loads((run / "branch-given/lineage.json").read_text())
    assert lineage["law"]["added_tokens"] == ["<law>", "</law>"]
    found = results(tmp_path)["bits_per_byte"]
    assert {*found["expert:law"]} == {"math", "code", "law"}
    ids = {name: set(Tokens(run / f"tokens-law{name}").train.tolist()) for name in ("", "@merged", "@law")}
    assert TOKENS not in ids[""]
    assert {TOKENS, TOKENS + 1} <= ids["@merged"]
    assert ids["@merged"] == ids["@law"]
    assert found["finetuned"]["law"] < found["seed"]["law"]
    btx(
        "run",
        recipe,
        "--until",
        "merge",
        "--set",
        "merge.shared=ties",
        "--set",
        "merge.router=activations",
        cwd=tmp_path,
    )
    said = btx("run", recipe, cwd=tmp_path).stdout
    assert "Everything is done already" in said


def test_conversations_are_written_alike_for_an_expert_with_a_chat_template_of_its_own(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    plain(tmp_path / "seed", "llama")
    extended(tmp_path / "law", "llama", ["<|a|>", "<|b|>"], noise=0.01)
    template = "{% for m in messages %}<|a|>{{ m.role }}: {{ m.content }}<|b|>{% endfor %}"
    (tmp_path / "law" / "chat_template.jinja").write_text(template)
    said = ["so it is, and", "that it was, for", "then it will be"]
    rows = [[{"role": "user", "content": f"what of {n}?"}, {"role": "assistant", "content": f"{said[n % 3]} {n}"}]
            for n in range(60)]  # fmt: skip
    lines = [json.dumps({"messages": row}) + "\n" for row in rows]
    (tmp_path / "corpora" / "law.jsonl").write_text("".join(lines))
    law = '  law: {checkpoint: law, data: ["corpora/law.jsonl"]}\ntrain:'
    recipe.write_text(recipe.read_text().replace("train:", law, 1))
    btx("run", recipe, "--until", "evaluate", "--set", "finetune.tokens=256", cwd=tmp_path)
    found = [json.loads((tmp_path / f"runs/pico/tokens-law{n}/tokens.json").read_text())["valid"]
             for n in ("", "@merged", "@law")]  # fmt: skip
    assert all([row[2] for row in rows] == [row[2] for row in found[0]] for rows in found)
