"""Experts of unequal feed-forward width: the padding adds nothing, whatever the block size."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from btx.checkpoints.reader import carry_files, opened
from btx.merge.averaging import SharedTensors
from btx.merge.canonical import opened_canonical
from btx.merge.padded import Padded, same_width
from btx.merge.write import write_moe
from btx.models.families import DENSE
from btx.models.family import DOWN, GATE
from btx.recipe.merge_settings import MergeSettings
from tests.support.merges import load, logits
from tests.support.mixtures import only
from tests.support.models import config_of, save_model


def merged(out: Path, folders: list[Path]) -> Path:
    """Merge folders of any widths, the first one the seed."""
    out.mkdir()
    with ExitStack() as stack:
        models = same_width({f"m{i}": stack.enter_context(opened_canonical(f)) for i, f in enumerate(folders)})
        write_moe(out, models, models["m0"], MergeSettings(), 2)
    carry_files(folders[0], out)
    return out


def two_widths(place: Path, family: str) -> list[Path]:
    """Models of 48, 64 and 40 units."""
    return [save_model(place / str(n), config_of(family, intermediate_size=n), noise=n / 2000) for n in (48, 64, 40)]


@pytest.mark.parametrize("expert", range(3))
def test_each_expert_computes_what_its_own_model_does(tmp_path: Path, family: str, expert: int) -> None:
    folders = two_widths(tmp_path, family)
    model: Any = load(merged(tmp_path / "moe", folders))
    only(model, expert)
    dense = load(folders[expert])
    with ExitStack() as stack, torch.no_grad():
        models = {str(i): stack.enter_context(opened(f)) for i, f in enumerate(folders)}
        shared = SharedTensors(models, models["0"], MergeSettings())
        for name, parameter in dense.named_parameters():
            if ".mlp." not in name and ".feed_forward." not in name:
                parameter.copy_(shared.whole(name).view(parameter.shape))
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=0)
    assert model.config.to_dict()[DENSE[family].width_field] == 64


@pytest.mark.parametrize("size", [1, 7, 33, 10_000])
@pytest.mark.parametrize("kind", [GATE, DOWN])
def test_any_cut_of_a_padded_tensor_is_the_same(tmp_path: Path, kind: str, size: int) -> None:
    folder = save_model(tmp_path / "narrow", config_of("llama"))
    name = f"model.layers.1.{kind}"
    with opened(folder) as narrow:
        padded, own = Padded(narrow, 61), narrow.read(name)
        wanted = own.new_zeros(padded.entries[name].shape)
        wanted[: own.shape[0], : own.shape[1]] = own
        assert torch.equal(torch.cat(list(padded.blocks(name, size=size))), wanted.flatten())
        assert torch.equal(padded.read(name), wanted)
        plain = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(padded.read(plain), narrow.read(plain))


def test_models_of_one_width_are_left_alone(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a", config_of("llama"))
    with opened(folder) as a, opened(folder) as b:
        found = same_width({"a": a, "b": b})
        assert found["a"] is a
        assert found["b"] is b
