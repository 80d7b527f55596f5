"""Arrow: an expert's router row is the input that its change answers to most."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from btx.checkpoints.reader import opened
from btx.conversions.pipeline import Graph
from btx.conversions.registry import load_recipe
from btx.merge.arrow import directions
from btx.models.families import DENSE
from tests.support.command import btx
from tests.support.models import config_of, save_model
from tests.support.project import write_project


def changed(folder: Path, seed: Path, change: torch.Tensor, kind: str) -> Path:
    """The seed with a matrix added to the gate or up projection of its second layer."""
    save_model(folder, config_of("llama"))
    tensors = load_file(seed / "model.safetensors")
    name = f"model.layers.1.mlp.{kind}_proj.weight"
    tensors[name] = tensors[name] + change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["gate", "up"])
def test_of_a_lora_of_rank_one_it_is_the_row_of_a(tmp_path: Path, kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, generator=random), torch.randn(48, generator=random)
    seed = save_model(tmp_path / "seed", config_of("llama"))
    expert = changed(tmp_path / "expert", seed, 0.1 * torch.outer(b, a), kind)
    with opened(seed) as one, opened(expert) as other:
        still, found = directions(one, other, [0, 1])
    assert not still.any()
    assert abs(float(found @ a / a.norm())) == pytest.approx(1.0, abs=1e-5)


def test_it_is_the_first_right_singular_vector_of_both_changes(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    expert = save_model(tmp_path / "expert", config_of("llama"), noise=0.03)
    with opened(seed) as one, opened(expert) as other:
        found = directions(one, other, [0, 1])
        for layer, row in enumerate(found):
            names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
            change = torch.cat([other.read(name) - one.read(name) for name in names])
            wanted = torch.linalg.svd(change.double()).Vh[0].float()
            assert abs(float(row @ wanted)) == pytest.approx(1.0, abs=1e-5)
            assert float(row.norm()) == pytest.approx(1.0, abs=1e-5)


def test_a_run_with_it_gives_each_expert_its_row_and_the_seed_none(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    said = ["merge.router=arrow", "merge.router_tokens=500", "domains.math.expert={adapter: {options: {r: 2}}}"]
    btx("run", "recipe.yaml", *[part for one in said for part in ("--set", one)], "--until", "merge", cwd=tmp_path)
    graph = Graph(load_recipe(recipe, [*said, f"run.directory={tmp_path / 'runs'}"]), tmp_path)
    merged, math = graph.steps["merge"].folder, graph.steps["adapter-merged:math"].folder
    with opened(merged) as moe, opened(tmp_path / "seed") as seed, opened(math) as expert:
        rows = [moe.read(DENSE["llama"].router_name(layer)) for layer in (0, 1)]
        for row, wanted in zip(rows, directions(seed, expert, [0, 1]), strict=True):
            assert row.shape == (3, 32)
            assert abs(float(row[0] @ wanted / row[0].norm())) == pytest.approx(1.0, abs=1e-4)
            assert not row[2].any()  # the seed has changed nothing
    refused = btx("plan", "recipe.yaml", "--set", "merge.router=arrow", "--set", "merge.experts=ffn+attention",
                  cwd=tmp_path, code=2)  # fmt: skip
    assert "arrow makes rows for feed-forward experts" in refused.stderr
