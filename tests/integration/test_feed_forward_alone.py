"""Experts that train their feed-forward blocks alone: all else stays the seed's, so averaging it changes nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from btx.models.family import DOWN, GATE, UP
from tests.support.command import btx
from tests.support.project import write_project


def test_all_but_the_feed_forward_blocks_is_the_seed_s_in_experts_and_average(tmp_path: Path) -> None:
    write_project(tmp_path, family="qwen3")
    for stage in ("merge", "evaluate"):  # the average is measured, so made, for the evaluation alone
        btx("run", "recipe.yaml", "--set", "train.trainable=ffn", "--until", stage,
            cwd=tmp_path)  # fmt: skip
    seed = load_file(tmp_path / "seed/model.safetensors")
    blocks = {name for name in seed if name.endswith((GATE, UP, DOWN))}
    assert len(blocks) == 6
    for expert in ("train-math", "train-code"):
        trained = load_file(tmp_path / f"runs/pico/{expert}/model.safetensors")
        assert trained.keys() == seed.keys()
        for name, tensor in seed.items():
            assert torch.equal(trained[name], tensor) == (name not in blocks), name
    average = load_file(tmp_path / "runs/pico/average/model.safetensors")
    for name in seed.keys() - blocks:  # (a + a) / 2 is a; of three it would be so but for the last bit
        assert torch.allclose(average[name], seed[name], rtol=2e-7, atol=0), name
