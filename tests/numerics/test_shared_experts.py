"""Shared experts, which every token visits: of the seed or the average, one or several, live or idle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from btx.checkpoints.reader import opened
from btx.errors import ArtifactError, RecipeError
from btx.export import lifecycle
from btx.export.extract import extract
from btx.merge.canonical import opened_canonical
from btx.models.families import DENSE
from btx.models.family import DOWN, UP
from btx.models.mixture import Moe
from tests.support.merges import IDS, load, logits, merge
from tests.support.mixtures import change
from tests.support.models import config_of, save_model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder in one file."""
    return load_file(folder / "model.safetensors")


SHARING = [family for family in DENSE if DENSE[family].shared]


@pytest.mark.parametrize("shared", ["seed", "average"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", SHARING)
def test_copies_beside_a_shared_expert_give_the_seeds_logits(
    tmp_path: Path, family: str, implementation: str, shared: str
) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    merged = merge(tmp_path / "moe", [seed] * 3, top_k=2, shared_expert=shared, router_entropy=0.8)
    torch.testing.assert_close(logits(load(merged, implementation)), logits(load(seed)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", SHARING)
def test_the_shared_expert_is_what_was_asked_and_the_others_give_the_other_half(tmp_path: Path, family: str) -> None:
    dense = [save_model(tmp_path / f"d{i}", config_of(family), noise=0.1 * i, dtype=torch.bfloat16) for i in range(3)]
    ours, prefix = DENSE[family], "model.layers.1."
    own = [tensors(d)[prefix + DOWN] for d in dense]
    wanted = {"seed": own[0], "average": torch.stack(own).float().mean(0).bfloat16()}
    for shared, down in wanted.items():
        merged = merge(tmp_path / shared, dense, top_k=1, base=0, shared_expert=shared)
        found = tensors(merged)
        assert torch.equal(found[prefix + ours.shared.names[DOWN]], down if ours.shared.gate else down / 2)
        assert not ours.shared.gate or not found[prefix + ours.shared.gate].any()
        with opened(merged) as checkpoint:
            expert = Moe(checkpoint).expert(2)
            assert torch.equal(torch.cat(list(expert(prefix, DOWN))), own[2].flatten() / 2)
            assert torch.equal(torch.cat(list(expert(prefix, UP))), tensors(dense[2])[prefix + UP].flatten())


@pytest.mark.parametrize("family", SHARING)
def test_a_shared_expert_learns_and_one_of_zeros_does_not(tmp_path: Path, family: str) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    for shared, learns in (("seed", True), ("none", False)):
        if DENSE[family].shared.count_field and not learns:
            continue  # there is none then
        model = load(merge(tmp_path / f"moe-{shared}", [seed] * 2, top_k=1, shared_expert=shared)).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        named, ours = dict(model.named_parameters()), DENSE[family].shared
        for name in (*ours.names.values(), *([ours.gate] if ours.gate else [])):
            assert bool(named[f"model.layers.0.{name}"].grad.any()) is learns


SEVERAL = [family for family in SHARING if DENSE[family].shared.width_field or DENSE[family].shared.count_field]


@pytest.mark.parametrize("family", SEVERAL)
def test_copies_beside_several_shared_experts_give_the_seeds_logits_and_each_is_in_the_block(
    tmp_path: Path, family: str
) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    merged = merge(tmp_path / "moe", [seed] * 3, top_k=2, shared_expert=["seed", "average"], router_entropy=0.8)
    torch.testing.assert_close(logits(load(merged)), logits(load(seed)), atol=1e-5, rtol=0)
    other = save_model(tmp_path / "other", config_of(family), noise=0.1)
    both = tensors(merge(tmp_path / "both", [seed, other], top_k=1, base=0, shared_expert=["seed", "average"]))
    ours, prefix = DENSE[family].shared, "model.layers.1."
    with opened_canonical(seed) as one, opened_canonical(other) as two:
        for kind, axis, factor in ((UP, 0, 1.0), (DOWN, 1, 0.5 if ours.gate else 0.25)):
            mine, its = (model.read(prefix + kind) for model in (one, two))
            wanted = factor * torch.cat([mine, (mine + its) / 2], axis)
            torch.testing.assert_close(both[prefix + ours.names[kind]], wanted, atol=1e-7, rtol=1e-6)


def test_a_class_with_one_shared_expert_is_not_given_two(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("hunyuan_v1_dense"))
    with pytest.raises(RecipeError, match=r"are several, and hunyuan_v1_moe has one"):
        merge(tmp_path / "moe", [seed] * 2, top_k=1, shared_expert=["seed", "seed"])


@pytest.mark.parametrize("family", sorted({*DENSE} - {*SHARING}))
def test_a_class_without_a_shared_expert_is_not_given_one(tmp_path: Path, family: str) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    with pytest.raises(RecipeError, match=r"needs an MoE class with a shared expert.*family qwen2"):
        merge(tmp_path / "moe", [seed] * 2, top_k=1, shared_expert="seed")


def test_a_live_shared_expert_cannot_be_left_out_of_a_dense_model(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("qwen2"))
    folder = merge(tmp_path / "moe", [seed] * 2, top_k=1, shared_expert="seed")
    with pytest.raises(ArtifactError, match="every token also visits a shared expert"):
        change(folder, "out", lambda out, moe: extract(out, moe, "0"))


@pytest.mark.parametrize("verb", ["add", "replace"])
def test_a_model_that_joins_a_mixture_with_a_shared_expert_gives_half_of_the_output_too(
    tmp_path: Path, verb: str
) -> None:
    seed = save_model(tmp_path / "seed", config_of("qwen2", num_hidden_layers=4))
    folder = merge(tmp_path / "moe", [seed] * 2, top_k=2, shared_expert="seed", layers=[1, 3], router_entropy=0.8)

    def join(out: Path, moe: Moe) -> None:
        with opened(seed) as dense:
            source = lifecycle.from_dense(dense, moe, "new")
            if verb == "add":
                lifecycle.add(out, moe, "new", source, lambda layer: 0.9 * moe.router(layer)[0])
            else:
                lifecycle.replace(out, moe, "1", source)

    torch.testing.assert_close(logits(load(change(folder, "out", join))), logits(load(seed)), atol=1e-5, rtol=0)
