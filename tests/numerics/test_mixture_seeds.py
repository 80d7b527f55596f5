"""Mixtures as seeds: experts of several stand side by side; copies give the seed where all of an expert are visited."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from btx.checkpoints.reader import opened
from btx.errors import ArtifactError, BtxError
from btx.export.extract import extract
from btx.export.lifecycle import config_of_pair, remove
from btx.graph.artifact import write_json
from btx.merge.layout import layout
from btx.models.kernels import use_kernel
from btx.models.mixture import Moe
from btx.models.own_experts import own_experts
from btx.moe.hooks import Routed, find_routers
from btx.recipe.merge_settings import MergeSettings
from tests.support.merges import IDS, load, logits, merge
from tests.support.mixtures import change
from tests.support.models import config_of, save_model
from tests.support.shapes import SPARSE, VARIANTS, sparse_config

SEEDS = [*(kind for kind in SPARSE if kind != "jetmoe"), *VARIANTS]


@pytest.fixture(params=SEEDS)
def name(request: pytest.FixtureRequest) -> str:
    """Every family that may be a mixture, and variants of some."""
    return str(request.param)


def saved(folder: Path, name: str, *, noise: float = 0.0, **changes: Any) -> Path:
    """A mixture with weights far from symmetry, its experts' biases too."""
    save_model(folder, sparse_config(name, **changes), noise=noise)
    found = load_file(folder / "model.safetensors")
    for key, tensor in found.items():
        if "bias" in key and ("expert_bias" in key or "e_score" in key):
            found[key] = torch.linspace(0.3, -0.3, tensor.numel()).reshape(tensor.shape)[..., [2, 0, 4, 1, 3]]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_copies_of_a_mixture_give_it_where_every_copy_of_an_expert_is_visited(
    tmp_path: Path, name: str, tied: bool
) -> None:
    seed = saved(tmp_path / "seed", name, tie_word_embeddings=tied)
    merged = load(merge(tmp_path / "moe", [seed] * 3, top_k=3, router="own"))
    wanted = logits(load(seed))
    for kernel in ("eager", "grouped_mm", "batched_mm", "sorted", "reference"):
        use_kernel(merged, kernel)
        torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=0)


def test_every_tensor_is_that_of_the_models_side_by_side_or_their_average(tmp_path: Path, name: str) -> None:
    """By the shapes in memory alone: what grows with the number of experts is joined, all else averaged."""
    folders = [saved(tmp_path / str(n), name, noise=0.02 * n) for n in range(3)]
    merged = load(merge(tmp_path / "moe", folders, top_k=2, router="own"))
    models = [load(folder).state_dict() for folder in folders]
    joined = 0
    for key, found in merged.state_dict().items():
        parts = [model[key] for model in models]
        wider = [axis for axis, size in enumerate(found.shape) if size != parts[0].shape[axis]]
        if not wider:
            wanted = torch.stack(parts).mean(0)
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6, msg=key)
            continue
        joined += 1
        whole = torch.cat(parts, wider[0])
        if key.endswith("e_score_correction_bias"):  # on probabilities that are a third of those in one of them
            whole = whole / 3
        assert torch.equal(found, whole), key
    assert joined >= 3 * len(find_routers(merged)) > 0


def test_a_random_row_for_each_model_is_added_to_all_of_its_own(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(n), "mixtral", noise=0.02 * n) for n in range(2)]
    own, random = (load(merge(tmp_path / how, folders, top_k=1, router=how)) for how in ("own", "random"))
    for one, two in zip(find_routers(own).values(), find_routers(random).values(), strict=True):
        added = (two.weight - one.weight).view(2, 5, -1)
        torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-6, rtol=0)
        assert (added[0] - added[1]).abs().max() > 1e-4


def test_copies_whose_units_are_reinitialised_are_others(tmp_path: Path) -> None:
    seed = saved(tmp_path / "seed", "granitemoe")
    merged = merge(tmp_path / "moe", [seed] * 2, top_k=2, router="own", reinitialize=0.5)
    before, after = load_file(seed / "model.safetensors"), load_file(merged / "model.safetensors")
    key = "model.layers.1.block_sparse_moe.output_linear.weight"
    same = (after[key] == torch.cat([before[key]] * 2)).float().mean((0, 1))
    assert 0.4 < float(same.mean()) < 0.6
    assert (after[key][:5] != after[key][5:]).any()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "ernie4_5_moe", "lfm2_moe with a bias", "hunyuan_v1_moe"])
def test_a_mixture_stored_as_it_is_in_memory_is_the_same(tmp_path: Path, name: str) -> None:
    seed = saved(tmp_path / "seed", name)
    fused = saved(tmp_path / "fused", name)
    state = load(seed).state_dict()
    state = {key: tensor.contiguous() for key, tensor in state.items() if key != "lm_head.weight" or key in state}
    save_file({key: tensor.clone() for key, tensor in state.items()}, fused / "model.safetensors", {"format": "pt"})
    one = load_file(merge(tmp_path / "one", [seed] * 2, top_k=2) / "model.safetensors")
    two = load_file(merge(tmp_path / "two", [fused] * 2, top_k=2) / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_training_chooses_and_weighs_as_its_stock_class_does(tmp_path: Path, name: str) -> None:
    model = load(saved(tmp_path / "seed", name))
    wanted = logits(model)
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.router_jitter_noise = 0.0
    with Routed(model.train(), "top_k", 2), torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "ernie4_5_moe", "lfm2_moe with a bias"])
def test_what_is_knocked_out_is_as_if_it_were_removed(tmp_path: Path, name: str) -> None:
    folders = [saved(tmp_path / str(n), name, noise=0.05 * n) for n in range(3)]
    merged = merge(tmp_path / "moe", folders, top_k=2, router="own")
    write_json(merged / "experts.json", {"experts": [f"m{n}.{e}" for n in range(3) for e in range(5)]})
    model = load(merged)
    with Routed(model, "top_k", 4, each=5) as routed:
        for gone in range(3):
            routed.without = gone
            found = logits(model)
            assert not any((layer.index_TK // 5 == gone).any() for layer in routed.layers)
            left = load(change(merged, f"without-{gone}", lambda out, moe, n=gone: remove(out, moe, [f"m{n}"])))
            torch.testing.assert_close(found, logits(left), atol=1e-5, rtol=0)


def test_an_expert_taken_out_of_a_mixture_is_what_it_computes_alone(tmp_path: Path) -> None:
    for name, more in (
        ("lfm2_moe", {"routed_scaling_factor": 2.5}),
        ("qwen3_moe", {}),
    ):
        seed = saved(tmp_path / name, name, **more)
        alone = change(seed, f"{name}-alone", lambda out, moe: remove(out, moe, ["0", "1", "2", "4"]))
        dense = change(seed, f"{name}-dense", lambda out, moe: extract(out, moe, "3"))
        torch.testing.assert_close(logits(load(dense)), logits(load(alone)), atol=1e-4, rtol=0)
    seed = saved(tmp_path / "shared", "granitemoe_swa", shared_intermediate_size=24)
    with pytest.raises(ArtifactError, match=r"shared_mlp.*, which a granite_swa model does not have"):
        change(seed, "shared-dense", lambda out, moe: extract(out, moe, "3"))


def test_a_mixture_is_no_expert_of_another_and_its_layers_are_no_difference(tmp_path: Path) -> None:
    seed = saved(tmp_path / "seed", "lfm2_moe with a bias")
    with opened(seed) as one, opened(seed) as other, pytest.raises(ArtifactError, match="is a mixture itself"):
        config_of_pair(one, Moe(other), "the expert x")
    plain = saved(tmp_path / "plain", "lfm2_moe", num_dense_layers=1, use_expert_bias=True, intermediate_size=12)
    dense = change(plain, "dense", lambda out, moe: extract(out, moe, "3"))
    with opened(dense) as one, opened(plain) as other:
        assert config_of_pair(one, Moe(other), "the expert x") == []


def test_a_key_that_a_class_does_not_read_decides_nothing() -> None:
    config = sparse_config("mixtral", norm_topk_prob=False).to_dict()
    assert own_experts(config, "the seed").normalised  # type: ignore[union-attr]


def test_tensors_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    seed = saved(tmp_path / "seed", "qwen3_moe")
    found = load_file(seed / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(found | {name: torch.zeros(5, 32, 12)}, seed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"experts\.0\.down_proj\.weight twice, once within {name}"):
        merge(tmp_path / "moe", [seed] * 2, top_k=2)


def test_one_expert_of_a_model_has_its_name(tmp_path: Path) -> None:
    seed = sparse_config("mixtral", num_local_experts=1, num_experts_per_tok=1)
    experts = layout(MergeSettings(), ["math", "seed"], seed.to_dict(), "the seed")
    assert list(experts.owners) == ["math", "seed"]


REFUSED = {
    "attention has experts": ("jetmoe", {}, {}, "makes no experts of a mixture's attention"),
    "sigmoids that do not add up": ("lfm2_moe", {"norm_topk_prob": False}, {}, "(norm_topk_prob: false)"),
    "no two numbers": ("hunyuan_v1_moe", {"num_experts_per_tok": [2, 1, 2]}, {}, "moe_topk = [2, 1, 2]"),
    "too many visited": ("mixtral", {"num_experts_per_tok": 6}, {}, "more than the 5 experts"),
    "experts in no layer": ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, {}, "has experts in no layer"),
    "split": ("mixtral", {}, {"experts": "split"}, "merge.experts: split applies to dense feed-forward blocks"),
    "some layers": ("qwen2_moe", {}, {"layers": [1]}, "merge.layers: [1] applies to dense"),
    "a shared expert": ("qwen2_moe", {}, {"shared_expert": "seed"}, "merge.shared_expert: seed applies to dense"),
    "arrow": ("mixtral", {}, {"router": "arrow"}, "merge.router: arrow applies to dense"),
    "experts of attention": ("mixtral", {}, {"experts": "ffn+attention"}, "Use merge.experts: per_model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_or_of_dense_models_is_refused(tmp_path: Path, case: str) -> None:
    name, changes, settings, said = REFUSED[case]
    seed = save_model(tmp_path / "seed", sparse_config(name, **changes))
    with pytest.raises(BtxError, match=re.escape(said)):
        merge(tmp_path / "moe", [seed] * 2, top_k=2, **settings)


def test_a_list_of_equal_numbers_is_that_number(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", sparse_config("hunyuan_v1_moe", num_experts_per_tok=[2, 2, 2]))
    merged = merge(tmp_path / "moe", [seed] * 2, top_k=2, router="own")
    assert load(merged).config.moe_topk == 4
    torch.testing.assert_close(logits(load(merged)), logits(load(seed)), atol=1e-5, rtol=0)


def test_a_dense_seed_has_no_router_of_its_own(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    with pytest.raises(BtxError, match=r"merge\.router: own leaves a mixture its own routers"):
        merge(tmp_path / "moe", [seed] * 2, top_k=2, router="own")
