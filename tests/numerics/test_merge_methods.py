"""Averaging methods: the identities that each must satisfy, mergekit's own output, and the memory they may use."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.checkpoints.reader import opened
from btx.errors import ResourceError
from btx.merge.averaging import average, mean, require_memory
from btx.merge.write import write_average
from btx.recipe.merge_settings import GROUPS, AveragingSettings, MergeSettings, SharedSettings, group_of
from tests.support.models import config_of, save_model

BASE = torch.linspace(-1, 1, 24).reshape(4, 6)
METHODS = ["mean", "linear", "task_arithmetic", "ties", "dare_ties", "slerp", "model_stock"]


def moved(number: int) -> torch.Tensor:
    """The base plus a random difference."""
    return BASE + 0.1 * torch.randn(BASE.shape, generator=torch.Generator().manual_seed(number))


def run(tensors: dict[str, torch.Tensor], method: str, *, seed: int = 0, **more: Any) -> torch.Tensor:
    """One averaged tensor."""
    return average(tensors, BASE, AveragingSettings(method=method, **more), name="w", seed=seed)


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_the_seed_average_to_it(method: str) -> None:
    names = ["a", "seed"] if method == "slerp" else ["a", "b", "seed"]
    found = run(dict.fromkeys(names, BASE), method)
    torch.testing.assert_close(found, BASE, atol=1e-6, rtol=0)


def test_linear_with_equal_weights_is_the_mean() -> None:
    tensors = {"a": moved(1), "b": moved(2), "seed": BASE}
    torch.testing.assert_close(run(tensors, "linear"), mean(list(tensors.values())))


def test_linear_weighs_by_name() -> None:
    found = run({"a": moved(1), "seed": BASE}, "linear", weights={"a": 3.0, "seed": 1.0})
    torch.testing.assert_close(found, 0.75 * moved(1) + 0.25 * BASE)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_ends_at_the_models_themselves(t: float) -> None:
    torch.testing.assert_close(run({"a": moved(1), "seed": BASE}, "slerp", t=t), BASE if t else moved(1))


def test_ties_at_full_density_of_agreeing_experts_is_their_mean() -> None:
    delta = torch.rand(BASE.shape, generator=torch.Generator().manual_seed(5)) + 0.1
    found = run({"a": BASE + delta, "b": BASE + 3 * delta}, "ties", density=1.0)
    torch.testing.assert_close(found, BASE + 2 * delta)


def test_ties_drops_what_most_do_not_agree_on() -> None:
    up, down = torch.full_like(BASE, 0.3), torch.full_like(BASE, -0.1)
    torch.testing.assert_close(run({"a": BASE + up, "b": BASE + down}, "ties", density=1.0), BASE + up)


def test_dare_depends_on_its_seed_only() -> None:
    tensors = {"a": moved(1), "b": moved(2)}
    torch.manual_seed(1)
    first = run(tensors, "dare_ties")
    torch.manual_seed(2)
    assert torch.equal(first, run(tensors, "dare_ties"))
    assert not torch.equal(first, run(tensors, "dare_ties", seed=1))


def test_model_stock_of_equal_experts_is_that_expert() -> None:
    tensors = {"a": moved(1), "b": moved(1), "seed": BASE}
    torch.testing.assert_close(run(tensors, "model_stock"), moved(1))


def test_the_mean_does_not_change_its_inputs() -> None:
    a, b = moved(1), moved(2)
    before = a.clone()
    mean([a, b])
    assert torch.equal(a, before)


def test_task_arithmetic_adds_weighed_differences() -> None:
    found = run({"a": moved(1), "b": moved(2)}, "task_arithmetic", weights={"a": 0.5}, scale=0.5)
    torch.testing.assert_close(found, BASE + 0.25 * (moved(1) - BASE) + 0.5 * (moved(2) - BASE))


@pytest.mark.parametrize(("depth", "wanted"), [(0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0)])
def test_a_list_of_weights_goes_linearly_through_the_layers(depth: float, wanted: float) -> None:
    assert AveragingSettings(method="linear", weights={"a": [1.0, 3.0, 2.0]}).weight("a", depth) == wanted


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A seed and two descendants of three layers; the seed is the last."""
    place = tmp_path_factory.mktemp("models")
    config = config_of("llama", num_hidden_layers=3)
    return [save_model(place / str(n), config, noise=noise) for n, noise in enumerate((0.02, 0.03, 0.0))]


def ours(out: Path, folders: list[Path], shared: Any) -> dict[str, torch.Tensor]:
    """Our average of folders, as models a, b, ... and seed."""
    out.mkdir()
    with ExitStack() as stack:
        names = [*"abcdef"[: len(folders) - 1], "seed"]
        models = {n: stack.enter_context(opened(f)) for n, f in zip(names, folders, strict=True)}
        write_average(out, models, models["seed"], MergeSettings(shared=shared))
    return load_file(out / "model.safetensors")


def theirs(out: Path, folders: list[Path], recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The output of mergekit's own command for a recipe."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate({"dtype": "float32", "base_model": str(folders[-1]), **recipe})
    run_merge(config, str(out), MergeOptions(copy_tokenizer=False, quiet=True))
    return {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}


def models(folders: list[Path], *parameters: dict[str, Any]) -> dict[str, Any]:
    """The models of a mergekit recipe."""
    rows = zip(folders, parameters, strict=False)
    return {"models": [{"model": str(f), "parameters": p} for f, p in rows]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by imports of mergekit
@pytest.mark.parametrize("case", ["mean", "linear", "task_arithmetic", "ties", "slerp", "model_stock", "by depth"])
def test_mergekit_itself_gives_the_same(tmp_path: Path, folders: list[Path], case: str) -> None:
    some, density = {"weight": 0.4, "density": 0.6}, {"weight": 1.0, "density": 0.6}
    mine, recipe = {
        "mean": ("mean", {"merge_method": "linear", **models(folders, *[{"weight": 1.0}] * 3)}),
        "linear": (
            {"method": "linear", "weights": {"a": 3.0, "b": 0.5}},
            {"merge_method": "linear", **models(folders, {"weight": 3.0}, {"weight": 0.5}, {"weight": 1.0})},
        ),
        "task_arithmetic": (
            {"method": "task_arithmetic", "weights": {"a": 0.4}, "scale": 0.7},
            {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.7}, **models(folders[:2], some, density)},
        ),
        "ties": (
            {"method": "ties", "weights": {"a": 0.4}, "density": 0.6},
            {"merge_method": "ties", **models(folders[:2], some, density)},
        ),
        "slerp": (
            {"method": "slerp", "t": 0.3},
            {"merge_method": "slerp", "parameters": {"t": 0.3}, "base_model": str(folders[0]),
             "models": [{"model": str(folders[0])}, {"model": str(folders[2])}]},
        ),
        "model_stock": ("model_stock", {"merge_method": "model_stock", **models(folders[:2], {}, {})}),
        "by depth": (
            {"method": "linear", "weights": {"a": [0.0, 2.0], "b": [1.0, 0.5, 3.0]}},
            {"merge_method": "linear",
             **models(folders, {"weight": [0.0, 2.0]}, {"weight": [1.0, 0.5, 3.0]}, {"weight": 1.0})},
        ),
    }[case]  # fmt: skip
    found = ours(tmp_path / "ours", [folders[0], folders[2]] if case == "slerp" else folders, mine)
    wanted = theirs(tmp_path / "theirs", folders, recipe)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-7, rtol=1e-6, msg=name)


def test_each_group_goes_by_its_own_method_and_the_others_by_the_common_one(
    tmp_path: Path, folders: list[Path]
) -> None:
    plain = {
        method: ours(tmp_path / method, folders, method)
        for method in ("mean", "ties", "model_stock", "task_arithmetic")
    }
    groups = {"attention": "ties", "norms": "model_stock", "embeddings": "task_arithmetic"}
    found = ours(tmp_path / "mixed", folders, {"method": "mean", "groups": groups})
    assert {group_of(name) for name in found} == {*GROUPS, "feed_forward"}
    for name, tensor in found.items():
        assert torch.equal(tensor, plain[groups.get(group_of(name), "mean")][name]), name


def test_norms_of_queries_and_keys_are_norms() -> None:
    names = ["self_attn.q_norm.weight", "input_layernorm.weight", "post_feedforward_layernorm.weight"]
    assert {group_of(f"model.layers.0.{name}") for name in names} | {group_of("model.norm.weight")} == {"norms"}
    assert group_of("model.layers.0.self_attn.q_proj.bias") == "attention"


def test_a_method_that_sees_whole_tensors_is_refused_where_memory_does_not_do(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btx.merge.averaging.BLOCK", 100)
    with opened(folders[0]) as base:
        require_memory(base, SharedSettings(), models=8, limit=2**19)
        with pytest.raises(ResourceError, match=r"lm_head\.weight .*by ties.*group head"):
            require_memory(base, SharedSettings(method="ties"), models=8, limit=2**19)
        with pytest.raises(ResourceError, match=r"Raise it\.$"):  # mean goes block by block: no method takes less
            require_memory(base, SharedSettings(), models=8, limit=2**10)
        of_blocks = {"embeddings": "mean", "head": "linear"}
        require_memory(base, SharedSettings(method="ties", groups=of_blocks), models=8, limit=2**19)
