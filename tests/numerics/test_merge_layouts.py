"""Expert layouts: some layers only, copies, a shared expert, reinitialised units."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.checkpoints.reader import opened
from btx.errors import ArtifactError, RecipeError
from btx.export import lifecycle
from btx.export.extract import extract
from btx.merge.canonical import opened_canonical
from btx.merge.layout import layout
from btx.merge.renewed import chosen, renewed
from btx.merge.router_init import fresh_routers
from btx.merge.write import write_moe
from btx.models.families import DENSE
from btx.models.family import DOWN, GATE, UP
from btx.models.mixture import Moe
from btx.moe.hooks import find_routers
from btx.recipe.merge_settings import MergeSettings
from btx.recipe.settings import FinetuneSettings
from btx.steps.finetune import Balanced
from tests.support.merges import IDS, load, logits, merge
from tests.support.mixtures import change
from tests.support.models import config_of, save_model

HALVES = [family for family in DENSE if DENSE[family].dense_layers]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder in one file."""
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("layers", ["alternate", [0, 3], [2]])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", HALVES)
def test_copies_in_some_layers_only_give_the_seeds_logits(
    tmp_path: Path, family: str, implementation: str, layers: Any
) -> None:
    seed = save_model(tmp_path / "seed", config_of(family, num_hidden_layers=4))
    merged = merge(tmp_path / "moe", [seed] * 3, top_k=2, layers=layers, router_entropy=0.8)
    model = load(merged, implementation)
    sparse = [1, 3] if layers == "alternate" else layers
    assert [int(name.split(".")[2]) for name in find_routers(model)] == sparse
    torch.testing.assert_close(logits(model), logits(load(seed)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", HALVES)
def test_in_layers_without_experts_the_feed_forward_blocks_are_averaged(tmp_path: Path, family: str) -> None:
    dense = [save_model(tmp_path / f"d{i}", config_of(family), noise=0.1 * i) for i in range(3)]
    found = tensors(merge(tmp_path / "moe", dense, top_k=1, layers=[1]))
    name = f"model.layers.0.{DOWN}"
    torch.testing.assert_close(found[name], torch.stack([tensors(d)[name] for d in dense]).mean(0))
    assert f"model.layers.1.{DOWN}" not in found


@pytest.mark.parametrize("family", sorted({*DENSE} - {*HALVES}))
def test_a_class_with_experts_in_every_layer_is_not_asked_for_less(tmp_path: Path, family: str) -> None:
    seed = save_model(tmp_path / "seed", config_of(family))
    with pytest.raises(RecipeError, match=f"a {family} becomes {DENSE[family].moe}, which has them in every.*qwen"):
        merge(tmp_path / "moe", [seed] * 2, top_k=1, layers="alternate")
    merge(tmp_path / "all", [seed] * 2, top_k=1, layers=[0, 1])


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("qwen3"))
    with pytest.raises(RecipeError, match="the layers 0 to 1"):
        merge(tmp_path / "moe", [seed] * 2, top_k=1, layers=[1, 2])


def test_copies_are_named_and_hold_their_models_blocks(tmp_path: Path, family: str) -> None:
    dense = [save_model(tmp_path / f"d{i}", config_of(family), noise=0.1 * i) for i in range(2)]
    settings = MergeSettings(copies={"m0": 3})
    assert settings.owners(["m0", "m1"]) == {"m0.0": "m0", "m0.1": "m0", "m0.2": "m0", "m1": "m1"}
    merged = merge(tmp_path / "moe", dense, top_k=2, copies={"m0": 3})
    with opened(merged) as checkpoint, ExitStack() as stack:
        moe = Moe(checkpoint)
        models = [stack.enter_context(opened_canonical(d)) for d in dense]
        assert moe.count == 4
        for e, owner in enumerate([0, 0, 0, 1]):
            for kind in (GATE, UP, DOWN):
                made = torch.cat(list(moe.expert(e)("model.layers.1.", kind)))
                assert torch.equal(made, models[owner].read(f"model.layers.1.{kind}").flatten())


def test_units_drawn_anew_are_the_same_in_all_three_matrices_and_the_rest_keeps_its_bits(
    tmp_path: Path, family: str
) -> None:
    seed = save_model(tmp_path / "seed", config_of(family, intermediate_size=50))
    merged = merge(tmp_path / "moe", [seed], top_k=1, copies=3, reinitialize=0.25)
    with opened(merged) as checkpoint, opened_canonical(seed) as dense:
        moe, changed = Moe(checkpoint), {}
        for layer in range(2):
            for e in range(3):
                for kind in (GATE, UP, DOWN):
                    before = dense.read(f"model.layers.{layer}.{kind}")
                    after = torch.cat(list(moe.expert(e)(f"model.layers.{layer}.", kind))).view_as(before)
                    unlike = (after != before).T if kind == DOWN else after != before
                    assert set(unlike.float().mean(1).tolist()) == {0.0, 1.0}  # units whole
                    changed[layer, e, kind] = tuple(unlike.all(1).nonzero().flatten().tolist())
                assert len(changed[layer, e, GATE]) == 12  # ⌊0.25 · 50⌋
                assert changed[layer, e, GATE] == changed[layer, e, UP] == changed[layer, e, DOWN]
    assert len({*changed.values()}) == 6  # others in each expert and layer


def test_what_is_drawn_has_the_mean_and_deviation_of_what_it_replaces() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(400, 300, generator=generator) * 0.3 + torch.linspace(-1, 3, 300)
    for down in (False, True):
        units = chosen(300 if down else 400, 0.5, "some expert")
        made = torch.cat(list(renewed(lambda: [matrix], 300, units, down=down, key="k"))).view(400, 300)
        old, new = (m[:, units] if down else m[units] for m in (matrix, made))
        assert abs(float(old.mean() - new.mean())) < 4 * float(old.std()) / len(old.flatten()) ** 0.5
        assert 0.98 < float(new.std() / old.std()) < 1.02
        assert abs(float(torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1])) < 0.02
        assert torch.equal((made == matrix).all(0 if down else 1), ~units)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_what_is_drawn_does_not_depend_on_how_blocks_are_cut(size: int) -> None:
    matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    units = chosen(20, 0.4, "u")
    whole = torch.cat(list(renewed(lambda: [matrix], 20, units, down=True, key="k")))
    cut = torch.cat(list(renewed(lambda: matrix.flatten().split(size), 20, units, down=True, key="k")))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=0)  # sums of other blocks round otherwise


def test_a_merge_with_units_drawn_anew_is_the_same_again_and_another_with_another_seed(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    made = [
        tensors(merge(tmp_path / str(i), [seed] * 2, top_k=1, reinitialize=0.5, seed=number))
        for i, number in enumerate((3, 3, 4))
    ]
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])
    assert not all(torch.equal(made[0][n], made[2][n]) for n in made[0])


@pytest.mark.parametrize("family", HALVES)
def test_life_goes_on_in_a_mixture_with_experts_in_some_layers(tmp_path: Path, family: str) -> None:
    dense = [save_model(tmp_path / f"d{i}", config_of(family), noise=0.05 * i) for i in range(4)]
    folder = merge(tmp_path / "moe", dense[:3], top_k=2, layers=[1], router_entropy=0.5)

    def law(out: Path, moe: Moe) -> None:
        with opened(dense[3]) as model:
            row = torch.linspace(-0.3, 0.3, int(moe.config["hidden_size"]))
            lifecycle.add(out, moe, "law", lifecycle.from_dense(model, moe, "law"), lambda _layer: row)

    added = change(folder, "added", law)
    assert json.loads((added / "config.json").read_text())["mlp_only_layers"] == [0]
    assert load(added).config.num_experts == 4
    removed = change(added, "removed", lambda out, moe: lifecycle.remove(out, moe, ["law"]))
    assert (removed / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    extracted = load(change(folder, "extracted", lambda out, moe: extract(out, moe, "1")))
    alone = load(change(folder, "alone", lambda out, moe: lifecycle.remove(out, moe, ["0", "2"])))
    torch.testing.assert_close(logits(extracted), logits(alone), atol=1e-5, rtol=0)


def test_a_dead_expert_is_told_with_the_layer_that_it_is_in(tmp_path: Path) -> None:
    seed, told = save_model(tmp_path / "seed", config_of("qwen3", num_hidden_layers=4)), []
    model = load(merge(tmp_path / "moe", [seed] * 2, top_k=1, layers="alternate"))
    settings = FinetuneSettings(routing="switch", sequence_length=1)  # so that IDS are enough sequences to judge by
    watch = Balanced(model, settings, "finetune", told.append, ["math", "code"])
    for router in find_routers(model).values():
        router.weight.data[:] = 0.0  # all tokens to the first
    model.train()(input_ids=IDS)
    watch.loss()
    watch.figures()
    assert [event.text.split(" is ")[0] for event in told] == [
        "layer 1: the expert code", "layer 3: the expert code",
    ]  # fmt: skip


def test_a_seed_that_claims_layers_without_end_is_refused() -> None:
    config = {**config_of("llama").to_dict(), "num_hidden_layers": 10**15}
    with pytest.raises(RecipeError, match="more than a model has"):
        layout(MergeSettings(), ["a", "b"], config, "the seed")


def test_a_mixture_without_experts_is_refused(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("qwen3"))
    config = json.loads((seed / "config.json").read_text())
    more = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 48, "num_experts_per_tok": 1}
    (seed / "config.json").write_text(json.dumps({**config, **more, "mlp_only_layers": [0, 1]}))
    with opened(seed) as checkpoint, pytest.raises(ArtifactError, match="experts in no layer"):
        Moe(checkpoint)


@pytest.mark.parametrize("found", [7, ["0"], [0.0]])
def test_a_damaged_list_of_dense_layers_ends_in_a_sentence(tmp_path: Path, found: Any) -> None:
    seed = save_model(tmp_path / "seed", config_of("qwen3"))
    folder = merge(tmp_path / "moe", [seed] * 2, top_k=1, layers=[1])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mlp_only_layers": found}))
    with opened(folder) as checkpoint, pytest.raises(ArtifactError, match="mlp_only_layers"):
        Moe(checkpoint)


def test_routers_from_data_go_to_the_layers_that_have_some(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("qwen3", num_hidden_layers=4))
    model = load(merge(tmp_path / "moe", [seed] * 2, top_k=1, layers="alternate"))
    batches = {"a": [IDS % 100], "b": [IDS % 90 + 150]}
    made = fresh_routers(model, batches, ["a", "b"], how="activations", entropy=0.9)
    assert len(made) == 2


def test_a_layout_without_enough_experts_for_top_k_is_refused(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    with opened(seed) as model, pytest.raises(RecipeError, match="makes 2 experts"):
        write_moe(tmp_path, {"a": model}, model, MergeSettings(copies=2), 3)
