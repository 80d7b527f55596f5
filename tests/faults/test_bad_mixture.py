"""`btx moe` on damaged mixtures and unfit experts: a sentence and exit code 2, 3 or 5, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from btx.cli.main import main
from btx.graph.artifact import write_json
from tests.support.merges import merge
from tests.support.mixtures import moe
from tests.support.models import config_of, save_model

NAMES = ["seed", "math", "code"]
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
STACKED = "model.layers.1.block_sparse_moe.input_linear.weight"
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtures of two families, an expert that fits, and one with masked experts."""
    folder = tmp_path_factory.mktemp("made")
    for family in ("llama", "granite"):
        seed = save_model(folder / family, config_of(family))
        out = merge(folder / f"moe-{family}", [seed] * 3, top_k=2)
        write_json(out / "experts.json", {"experts": NAMES})
    moe("mask", folder / "moe-llama", "--name", "math", "--name", "seed", out=folder / "masked-llama")
    return folder


def config(**fields: Any) -> Damage:
    """Change config.json; None removes a field."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text()) | fields
        write_json(folder / "config.json", {k: v for k, v in found.items() if v is not None})

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor | None], new: str = "") -> Damage:
    """Change a tensor, remove it (None), or add the changed one under a new name."""

    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        made = make(found[name] if new else found.pop(name))
        save_file(found | ({} if made is None else {new or name: made.contiguous()}), folder / "model.safetensors")

    return change


def names(text: str) -> Damage:
    """Change experts.json."""
    return lambda folder: (folder / "experts.json").write_text(text) and None


E0 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
BAD = {
    "no count": (config(num_local_experts=None), "num_local_experts = None"),
    "count in words": (config(num_local_experts="three"), "num_local_experts = 'three'"),
    "a huge count": (config(num_local_experts=10**15), "is 3x32, by config.json it should be"),
    "no layers": (config(num_hidden_layers=None), "num_hidden_layers = None"),
    "more layers": (config(num_hidden_layers=3), "model.layers.2.block_sparse_moe.gate.weight is missing"),
    "layers without end": (config(num_hidden_layers=10**15), "more than a model has"),
    "fewer layers": (config(num_hidden_layers=1), "belongs to no expert"),
    "no width": (config(hidden_size=None), "hidden_size = None"),
    "no top-k": (config(num_experts_per_tok=None), "num_experts_per_tok = None"),
    "top-k of more than all": (config(num_experts_per_tok=9), "a whole number from 1 to 3"),
    "a name twice": (names('{"experts": ["a", "a", "b"]}'), "a name appears twice"),
    "names in a word": (names('{"experts": "abc"}'), "not a list of names"),
    "names too deep": (names("[" * 100_000), "experts.json is damaged"),
    "no router": (tensor(ROUTER, lambda _: None), "gate.weight is missing"),
    "a short router": (tensor(ROUTER, lambda t: t[:2]), "gate.weight is 2x32"),
    "a flat router": (tensor(ROUTER, lambda t: t[0]), "gate.weight is 32, "),
    "an expert's tensor is missing": (tensor(E0, lambda _: None), "experts.0.w1.weight is missing"),
    "an expert too many": (tensor(E0, torch.clone, new=E0.replace("0.w1", "9.w1")), "belongs to no expert"),
    "experts fused beside": (tensor(E0, torch.clone, new="model.layers.1.mlp.experts.gate_up_proj"), "to no expert"),
    "experts fused by half": (tensor(E0, torch.clone, new="model.layers.0.mlp.experts.down_proj"), "is missing"),
}


@pytest.mark.parametrize("verb", ["remove", "mask", "extract"])
@pytest.mark.parametrize("case", BAD)
def test_a_damaged_mixture_is_refused(made: Path, tmp_path: Path, case: str, verb: str) -> None:
    damage, said = BAD[case]
    folder = Path(shutil.copytree(made / "moe-llama", tmp_path / "bad"))
    damage(folder)
    assert said in moe(verb, folder, "--name", "0", out=tmp_path / "out", code=3)


@pytest.mark.parametrize("make", [lambda t: t[:2], torch.flatten, lambda _: None], ids=["fewer", "flat", "none"])
def test_damaged_stacked_experts_are_refused(made: Path, tmp_path: Path, make: Any) -> None:
    folder = Path(shutil.copytree(made / "moe-granite", tmp_path / "bad"))
    tensor(STACKED, make)(folder)
    assert STACKED in moe("extract", folder, "--name", "0", out=tmp_path / "out", code=3)


MASKED = {
    "places twice": (config(places=[0, 0]), "not distinct places among 3"),
    "places out of range": (config(places=[0, 3]), "not distinct places among 3"),
    "a negative place": (config(places=[-1, 0]), "not distinct places among 3"),
    "places in words": (config(places=["0", "1"]), "not distinct places among 3"),
    "no places": (config(places=None), "a place for every expert"),
    "fewer names": (config(names=["math"]), "a place for every expert"),
    "a name that is there": (config(names=["seed", "code"]), "not distinct names of experts"),
    "numbers for names": (config(names=[1, 2]), "not distinct names of experts"),
    "another family": (config(model_type="qwen3_moe"), "it belongs to a qwen3_moe"),
    "no top-k": (config(top_k=None), "top_k = None"),
    "top-k of more than all": (config(top_k=4), "from 1 to 3"),
    "a short router": (tensor(ROUTER, lambda t: t[:1]), "gate.weight is 1x32"),
    "no tensor": (tensor("model.layers.0.1.mlp.up_proj.weight", lambda _: None), "up_proj.weight is missing"),
    "a narrow tensor": (tensor("model.layers.0.1.mlp.up_proj.weight", lambda t: t[:5]), "up_proj.weight is 5x32"),
    "not a number": (tensor("model.layers.0.1.mlp.up_proj.weight", lambda t: t * torch.nan), "NaN"),
}


@pytest.mark.parametrize("case", MASKED)
def test_damaged_masked_experts_are_refused(made: Path, tmp_path: Path, case: str) -> None:
    damage, said = MASKED[case]
    folder = Path(shutil.copytree(made / "masked-llama", tmp_path / "bad"))
    damage(folder / "masked")
    assert "SHA256SUMS" in moe("unmask", folder, out=tmp_path / "out", code=3)
    (folder / "SHA256SUMS").unlink()  # without digests the checks of the contents remain
    assert said in moe("unmask", folder, out=tmp_path / "out", code=3)


@pytest.mark.parametrize("verb", ["mask", "remove"])
def test_masked_experts_are_never_left_behind(made: Path, tmp_path: Path, verb: str) -> None:
    assert "unmask" in moe(verb, made / "masked-llama", "--name", "code", out=tmp_path / "out", code=2)


def test_masked_experts_keep_their_own_precision(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "moe-llama", tmp_path / "mixed"))
    for layer in range(2):
        tensor(ROUTER.replace("1", str(layer)), lambda t: t.bfloat16())(folder)
    moe("mask", folder, "--name", "math", out=tmp_path / "off")
    moe("unmask", tmp_path / "off", out=tmp_path / "on")
    moe("extract", folder, "--name", "math", out=tmp_path / "dense")
    found, wanted = (load_file(tmp_path / f / "model.safetensors") for f in ("on", "mixed"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) and found[n].dtype == wanted[n].dtype for n in wanted)
    assert {t.dtype for t in load_file(tmp_path / "dense" / "model.safetensors").values()} == {torch.float32}


UNFIT = {
    "another head_dim": (None, "head_dim: the mixture 8, it 16"),
    "fewer rows than its config": (tensor("model.embed_tokens.weight", lambda t: t[:290]), "embed_tokens.weight is"),
    "NaN in what is shared": (
        tensor("model.layers.1.self_attn.q_proj.weight", lambda t: t * torch.nan),
        "model.layers.1.self_attn.q_proj.weight holds 1024 NaN",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_expert_is_refused(made: Path, tmp_path: Path, case: str) -> None:
    damage, said = UNFIT[case]
    expert = tmp_path / "expert"
    if damage:
        damage(Path(shutil.copytree(made / "llama", expert)))
    else:
        save_model(expert, config_of("llama", head_dim=16))
    assert said in moe("replace", made / "moe-llama", expert, "--name", "math", out=tmp_path / "out", code=3)


@pytest.mark.parametrize(
    ("family", "field"), [("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
                          ("mistral", {"sliding_window": 4}), ("granite", {"residual_multiplier": 0.5}),
                          ("granite", {"logits_scaling": 3.0}), ("granite", {"embedding_multiplier": 3.0}),
                          ("granite", {"attention_multiplier": 0.7}), ("llama", {"hidden_act": "gelu"}),
                          ("olmo2", {"rms_norm_eps": 0.5})], ids=str
)  # fmt: skip
def test_an_expert_that_computes_otherwise_is_refused(tmp_path: Path, family: str, field: dict[str, Any]) -> None:
    mixture = merge(tmp_path / "moe", [save_model(tmp_path / "seed", config_of(family))] * 2, top_k=2)
    expert = save_model(tmp_path / "expert", config_of(family, **field))
    said = moe("replace", mixture, expert, "--name", "0", out=tmp_path / "out", code=3)
    assert "config.json differs in " in said
    assert f"{next(iter(field))}: the mixture " in said


def test_the_new_folder_lies_outside_and_has_a_name(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made / "moe-llama"
    assert "lies inside" in moe("remove", folder, "--name", "math", out=folder / "masked", code=2)
    result = CliRunner().invoke(main, ["moe", "remove", str(folder), "--name", "math", "--out", "y" * 300])
    assert result.exit_code == 5, result.exception
    monkeypatch.chdir(folder)
    moe("remove", ".", "--name", "math", out=tmp_path / "out")
    assert "base_model: moe-llama" in (tmp_path / "out" / "README.md").read_text()
