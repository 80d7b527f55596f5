"""Optimiser moments carried over from experts: what is shared goes on as if it had never been merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from btx.cli.plan import rows
from btx.conversions.registry import load_recipe
from btx.models.families import DENSE
from btx.models.family import DOWN, GATE, LAYER, UP, part_rows
from btx.training.loop import groups
from btx.training.moments import Moments, write_moments
from tests.support.command import btx
from tests.support.merges import load, merge
from tests.support.models import config_of, save_model
from tests.support.project import write_project

IDS = torch.arange(120).reshape(3, 40) * 11 % 300


def optimizer_of(model: Any, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """As the training loop makes it."""
    return torch.optim.AdamW(groups(model, 0.1), lr=1e-3, betas=betas, fused=True)


def step(model: Any, optimizer: torch.optim.AdamW, ids: torch.Tensor = IDS) -> None:
    """One step of next-token training."""
    logits = model(input_ids=ids).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(folder: Path, family: str, steps: int, *, betas: tuple[float, float] = (0.9, 0.95), seed: int = 0,
            frozen: bool = False) -> tuple[Any, torch.optim.AdamW]:  # fmt: skip
    """A dense model after some steps, saved in `folder` with its moments; and its optimiser."""
    if not folder.exists():
        save_model(folder, config_of(family))
    model = load(folder).train()
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name)
    optimizer = optimizer_of(model, betas)
    for _ in range(steps):
        step(model, optimizer, (IDS + seed) % 300)
    model.save_pretrained(folder)
    write_moments(folder, model, optimizer)
    return model, optimizer


def mixture(tmp_path: Path, folders: list[Path]) -> Any:
    """A merged model, every expert visited by every token."""
    return load(merge(tmp_path / "moe", folders, top_k=len(folders))).train()


def test_shared_tensors_of_a_mixture_of_copies_go_on_as_the_dense_model_does(tmp_path: Path, family: str) -> None:
    """Equal experts give the dense model's logits, so its gradients; the means of equal moments are those moments."""
    dense, its = trained(tmp_path / "a", family, 5)
    moe = mixture(tmp_path, [tmp_path / "a"] * 2)
    optimizer = optimizer_of(moe)
    Moments({"m0": tmp_path / "a", "m1": tmp_path / "a"}, ["m0", "m1"]).carry(moe, optimizer)
    before = dict(dense.state_dict())
    before = {name: tensor.clone() for name, tensor in before.items()}
    step(dense, its)
    step(moe, optimizer)
    ours = DENSE[family]
    idle = (*ours.copies.values(), *(ours.shared.names.values() if ours.shared else ()))
    shared = {name: p for name, p in moe.named_parameters() if name in before and not name.endswith(idle)}
    assert {name for name in shared if "self_attn" in name}
    for name, parameter in shared.items():
        assert not torch.equal(dense.get_parameter(name), before[name]), name
        torch.testing.assert_close(parameter, dense.get_parameter(name), rtol=1e-4, atol=2e-6, msg=name)


def test_every_expert_keeps_its_own_and_the_seed_and_the_router_have_none(tmp_path: Path, family: str) -> None:
    ours = [trained(tmp_path / name, family, n, betas=b, seed=n)
            for name, n, b in (("a", 3, (0.9, 0.95)), ("b", 7, (0.8, 0.99)))]  # fmt: skip
    save_model(tmp_path / "s", config_of(family))
    moe = mixture(tmp_path, [tmp_path / n for n in "abs"])
    optimizer = optimizer_of(moe, (0.7, 0.9))
    Moments({"m0": tmp_path / "a", "m1": tmp_path / "b"}, ["m0", "m1", "m2"]).carry(moe, optimizer)
    state = {name: optimizer.state[p] for name, p in moe.named_parameters() if p in optimizer.state}
    assert all(entry["step"] == 3 for entry in state.values())
    assert not any("router" in name or name.endswith(".gate.weight") for name in state)

    def unbiased(name: str, kind: str, beta: int) -> list[torch.Tensor]:
        below, parts = LAYER.fullmatch(name)[2], DENSE[family].parts
        stored = next((s for s, some in parts.items() if below in some), below)
        found = [
            o.state[m.get_parameter(name.removesuffix(below) + stored)][kind]
            / (1 - o.param_groups[0]["betas"][beta] ** n)
            for (m, o), n in zip(ours, (3, 7), strict=True)
        ]
        if stored == below:
            return found
        rows = part_rows(parts[stored], len(found[0]), config_of(family).to_dict())
        return [whole.split(rows)[parts[stored].index(below)] for whole in found]

    for beta, (kind, now) in enumerate((("exp_avg", 1 - 0.7**3), ("exp_avg_sq", 1 - 0.9**3))):
        for layer in range(2):
            prefix = f"model.layers.{layer}."
            ends = ("q_proj.weight", "in_proj_qkv.weight", "conv.in_proj.weight")
            shared = next(n for n in state if n.startswith(prefix) and n.endswith(ends))
            one = unbiased(shared, kind, beta)
            torch.testing.assert_close(state[shared][kind], sum(one) / 2 * now)
            gate, up, down = (unbiased(prefix + n, kind, beta) for n in (GATE, UP, DOWN))
            found = next(v for n, v in state.items() if n.startswith(prefix) and n.endswith("gate_up_proj"))[kind]
            for e in range(2):
                torch.testing.assert_close(found[e], torch.cat([gate[e], up[e]]) * now)
            assert not found[2].any()
            found = next(v for n, v in state.items() if n.startswith(prefix) and n.endswith("down_proj"))[kind]
            for e in range(2):
                torch.testing.assert_close(found[e], down[e] * now)
            assert not found[2].any()


def test_a_tensor_that_some_experts_froze_has_the_mean_of_the_others(tmp_path: Path) -> None:
    whole, its = trained(tmp_path / "a", "llama", 4)
    trained(tmp_path / "b", "llama", 4, frozen=True)
    moe = mixture(tmp_path, [tmp_path / "a", tmp_path / "b"])
    name = "model.layers.0.self_attn.q_proj.weight"
    for folders, there in (({"m0": "a", "m1": "b"}, True), ({"m1": "b"}, False)):
        optimizer = optimizer_of(moe)
        Moments({m: tmp_path / f for m, f in folders.items()}, ["m0", "m1"]).carry(moe, optimizer)
        assert (moe.get_parameter(name) in optimizer.state) == there
        if there:
            found = optimizer.state[moe.get_parameter(name)]["exp_avg"]
            torch.testing.assert_close(found, its.state[whole.get_parameter(name)]["exp_avg"])


def test_a_run_carries_them_and_keys_what_it_changes_alone(tmp_path: Path) -> None:
    """Experts have the same weights with and without their moments beside them; the finetuned model differs."""
    write_project(tmp_path)
    hashes = []
    for how in ("fresh", "experts"):
        btx("run", "recipe.yaml", "--set", f"finetune.moments={how}", "--until", "finetune", cwd=tmp_path)
        made = tmp_path / "runs/pico"
        hashes.append([(made / s / "model.safetensors").read_bytes() for s in ("train-math", "merge", "finetune")])
        assert (made / "train-math/optimizer/moments.safetensors").exists() == (how == "experts")
        assert not (made / "merge/optimizer").exists()
    assert [a == b for a, b in zip(*hashes, strict=True)] == [True, True, False]


def test_the_plan_counts_what_they_take(tmp_path: Path) -> None:
    """To within the header of the file."""
    write_project(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.yaml", [])
    more = load_recipe(tmp_path / "recipe.yaml", ["finetune.moments=experts"])
    disk = [next(row.disk for row in rows(r, tmp_path) if row.label == "train:math") for r in (recipe, more)]
    _, optimizer = trained(tmp_path / "a", "llama", 1)
    assert optimizer.state
    assert (tmp_path / "a/optimizer/moments.safetensors").stat().st_size == pytest.approx(disk[1] - disk[0], rel=0.1)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["domains.math.checkpoint=seed"], "math was made elsewhere"),
        (["merge.experts=split"], "whole feed-forward blocks"),
        (["merge.reinitialize=0.5"], "whole feed-forward blocks"),
        (["run.launch=two.yaml"], "not tried on shards"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_before_anything_runs(
    tmp_path: Path, sets: list[str], said: str
) -> None:
    write_project(tmp_path)
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n")
    flags = [f for one in ["finetune.moments=experts", *sets] for f in ("--set", one)]
    assert said in btx("run", "recipe.yaml", *flags, cwd=tmp_path, code=2).stderr
    assert not (tmp_path / "runs/pico/train-code").exists()
