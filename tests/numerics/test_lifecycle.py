"""Changes to a Mixture of Experts after the merge: what stays bit-identical, and what the changed model computes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btx.checkpoints.reader import Checkpoint, opened
from btx.checkpoints.writer import write_weights
from btx.errors import ArtifactError, RecipeError
from btx.export import lifecycle
from btx.export.extract import extract
from btx.export.masked import Masked
from btx.export.portable import rows as rows_in
from btx.graph.artifact import write_json
from btx.merge.canonical import opened_canonical
from btx.merge.router_fit import MARGIN, Normal, fit_rows, solve, targets
from btx.models.families import DENSE
from btx.models.mixture import Moe
from btx.moe.dialects import Plain, Sigmoid, dialect_of
from btx.moe.hooks import find_routers
from tests.support.merges import load, logits, merge
from tests.support.mixtures import change, only
from tests.support.models import config_of, save_model

NAMES = ["math", "code", "seed"]


@pytest.fixture
def dense(tmp_path: Path, family: str) -> list[Path]:
    """Three models of one seed, and a fourth."""
    return [save_model(tmp_path / f"dense-{i}", config_of(family), noise=0.05 * i) for i in range(4)]


@pytest.fixture
def folder(tmp_path: Path, dense: list[Path]) -> Path:
    """The first three as a Mixture of Experts with a far from uniform router."""
    out = merge(tmp_path / "moe", dense[:3], top_k=2, router_entropy=0.5)
    write_json(out / "experts.json", {"experts": NAMES})
    return out


def add(out: Path, moe: Moe, dense: Path, name: str = "law") -> None:
    """Add a dense model with some router row."""
    with opened_canonical(dense) as model:
        row = torch.linspace(-0.3, 0.3, int(moe.config["hidden_size"]))
        lifecycle.add(out, moe, name, lifecycle.from_dense(model, moe, name), lambda layer: row * (layer + 1))


def same_files(a: Path, b: Path, *names: str) -> None:
    """The files are the same to the byte."""
    for name in names or ("model.safetensors", "config.json", "experts.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return load_file(folder / "model.safetensors")


def test_remove_is_the_inverse_of_add_to_the_byte(folder: Path, dense: list[Path]) -> None:
    larger = change(folder, "larger", lambda out, moe: add(out, moe, dense[3]))
    back = change(larger, "back", lambda out, moe: lifecycle.remove(out, moe, ["law"]))
    same_files(folder, back, "model.safetensors", "experts.json")
    assert Checkpoint(folder).config == Checkpoint(back).config
    again = change(back, "again", lambda out, moe: add(out, moe, dense[3]))
    same_files(larger, again)


def test_add_keeps_the_bits_of_everything_else_and_has_the_new_expert(
    folder: Path, dense: list[Path], family: str
) -> None:
    larger = change(folder, "larger", lambda out, moe: add(out, moe, dense[3]))
    old, new = tensors(folder), tensors(larger)
    router = DENSE[family].router
    for name, tensor in old.items():
        if name.endswith(router) or tensor.shape != new[name].shape:
            assert torch.equal(new[name][..., :3] if "correction_bias" in name else new[name][:3], tensor)
        else:
            assert torch.equal(new[name], tensor)
    one_hot, wanted = load(larger), load(change(larger, "law", lambda out, moe: extract(out, moe, "law")))
    assert one_hot.config.to_dict()[DENSE[family].top_k_field] == 2
    only(one_hot, 3)
    torch.testing.assert_close(logits(one_hot), logits(wanted), atol=1e-5, rtol=0)


@pytest.mark.parametrize("expert", range(3))
def test_extract_gives_the_dense_model_of_one_expert(folder: Path, dense: list[Path], expert: int, family: str) -> None:
    alone = change(folder, "alone", lambda out, moe: extract(out, moe, NAMES[expert]))
    model = load(folder)
    only(model, expert)
    torch.testing.assert_close(logits(load(alone)), logits(model), atol=1e-5, rtol=0)
    if family != "phi3":  # of which Mixtral keeps separate projections, so that a Mistral comes out
        assert tensors(alone).keys() == tensors(dense[0]).keys()
    down = "model.layers.1.mlp.down_proj.weight"
    with opened_canonical(alone) as one, opened_canonical(dense[expert]) as other:
        assert torch.equal(one.read(down), other.read(down))


@pytest.mark.parametrize("gone", [["math"], ["seed"], ["1"], ["math", "code"]], ids=str)
def test_a_removed_expert_is_as_one_that_is_never_chosen(folder: Path, gone: list[str], family: str) -> None:
    smaller = load(change(folder, "smaller", lambda out, moe: lifecycle.remove(out, moe, gone)))
    numbers = [NAMES.index(n) if n in NAMES else int(n) for n in gone]
    kept = [n for n in range(3) if n not in numbers]
    k = min(2, len(kept))
    assert smaller.config.to_dict()[DENSE[family].top_k_field] == k
    model = load(folder)

    def without(dialect: Plain, _m: Any, _i: Any, out: Any) -> Any:
        score = dialect.read(out, 2)[0][:, kept].float()
        weight, index = (score.exp() if isinstance(dialect, Sigmoid) else score.softmax(-1)).topk(k, -1)
        weight = weight / (weight.sum(-1, keepdim=True) + (1e-6 if isinstance(dialect, Sigmoid) else 0.0))
        padding = torch.zeros(len(index), 2 - k)
        index = torch.cat([torch.tensor(kept)[index], padding.long() + kept[0]], 1)
        return out[0], torch.cat([weight, padding], 1), index

    for router in find_routers(model).values():
        dialect = dialect_of(router)
        dialect.listen()
        router.register_forward_hook(partial(without, dialect))
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-5, rtol=0)


def test_replacing_an_expert_with_itself_changes_no_byte(folder: Path, dense: list[Path], family: str) -> None:
    def work(out: Path, moe: Moe, with_: Path) -> None:
        with opened_canonical(with_) as model:
            lifecycle.replace(out, moe, "code", lifecycle.from_dense(model, moe, "code"))

    same = change(folder, "same", lambda out, moe: work(out, moe, dense[1]))
    found, wanted = tensors(same), tensors(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    other = tensors(change(folder, "other", lambda out, moe: work(out, moe, dense[3])))
    changed = {n for n in wanted if not torch.equal(other[n], wanted[n])}
    assert len(changed) == 2 * (2 if DENSE[family].stacked else 3)
    assert not any(n.endswith(DENSE[family].router) for n in changed)


@pytest.mark.parametrize("off", [["math"], ["code", "seed"]], ids=str)
def test_what_was_masked_comes_back_with_its_bits_in_its_place(folder: Path, off: list[str]) -> None:
    def hide(out: Path, moe: Moe) -> None:
        lifecycle.remove(out, moe, off)
        lifecycle.keep(out / "masked", moe, off)

    masked = change(folder, "off", hide)
    removed = change(folder, "removed", lambda out, moe: lifecycle.remove(out, moe, off))
    same_files(masked, removed)

    def show(out: Path, moe: Moe) -> None:
        with opened_canonical(masked / "masked") as away:
            lifecycle.unmask(out, moe, Masked(away, moe))

    back = change(masked, "on", show)
    found, wanted = tensors(back), tensors(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert Checkpoint(back).config == Checkpoint(folder).config
    same_files(back, folder, "experts.json")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    seed = save_model(tmp_path / "seed", config_of("llama"))
    folder = merge(tmp_path / "moe", [seed] * 2, top_k=2)
    wide = save_model(tmp_path / "wide", config_of("llama", intermediate_size=64))
    with opened(folder) as checkpoint, opened(wide) as dense:
        moe = Moe(checkpoint)
        assert moe.names == ["0", "1"]
        with pytest.raises(ArtifactError, match=r"gate_proj\.weight is 64x32, .* are 48x32"):
            lifecycle.from_dense(dense, moe, "law")
        with pytest.raises(RecipeError, match="no expert '2'"):
            lifecycle.remove(tmp_path, moe, ["2"])
        with pytest.raises(RecipeError, match="no expert left"):
            lifecycle.remove(tmp_path, moe, ["0", "1"])
        with pytest.raises(RecipeError, match="already has an expert '1'"):
            lifecycle.add(tmp_path, moe, "1", moe.expert(0), moe.router)
    with opened_canonical(seed) as checkpoint, pytest.raises(ArtifactError, match="not a Mixture of Experts"):
        Moe(checkpoint)


def fused(folder: Path) -> Path:
    """The same mixture with its experts fused, as `export.layout: fused` writes it."""
    out = folder.with_name(f"{folder.name}-fused")
    out.mkdir()
    with opened_canonical(folder) as checkpoint:
        write_weights(out, rows_in(checkpoint, "fused"))
    for name in ("config.json", "experts.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    return out


def hidden(out: Path, moe: Moe, there: Path) -> None:
    """Mask an expert, written to `there`, then unmask it."""
    lifecycle.keep(there, moe, ["code"])
    lifecycle.remove(out, moe, ["code"])
    (out / "on").mkdir()
    with opened(out) as rest, opened(there) as away:
        lifecycle.unmask(out / "on", Moe(rest), Masked(away, Moe(rest)))


@pytest.mark.parametrize("verb", ["add", "remove", "replace", "unmask", "extract"])
def test_a_fused_mixture_becomes_what_the_published_one_becomes_and_stays_fused(
    folder: Path, dense: list[Path], verb: str
) -> None:
    def work(out: Path, moe: Moe) -> None:
        with opened_canonical(dense[3]) as model:
            {
                "add": lambda: add(out, moe, dense[3]),
                "remove": lambda: lifecycle.remove(out, moe, ["code", "math"]),
                "replace": lambda: lifecycle.replace(out, moe, "code", lifecycle.from_dense(model, moe, "code")),
                "unmask": lambda: hidden(out, moe, out.with_name(f"{out.name}-masked")),
                "extract": lambda: extract(out, moe, "code"),
            }[verb]()

    inner = "on" if verb == "unmask" else "."
    wanted, found = change(folder, "wanted", work) / inner, change(fused(folder), "found", work) / inner
    same_files(wanted, found, "config.json", *(["experts.json"] if verb != "extract" else []))
    reference = tensors(wanted) if verb == "extract" else tensors(fused(wanted))
    assert any(name.endswith("experts.gate_up_proj") for name in reference) == (verb != "extract")
    assert tensors(found).keys() == reference.keys()
    assert all(torch.equal(tensors(found)[n], reference[n]) for n in reference)
    assert torch.equal(logits(load(found)), logits(load(wanted)))


# --- the router row of an added expert ---------------------------------------------------------------------


def test_the_row_is_the_ridge_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [Normal.empty(6), Normal.empty(6)]
    x = [torch.randn(40, 6, generator=generator) for _ in sides]
    y = [torch.randn(40, generator=generator) for _ in sides]
    for side, a, b in zip(sides, x, y, strict=True):
        side.add(a[:15], b[:15])
        side.add(a[15:], b[15:])
    row = solve(sides).double().requires_grad_()
    error = sum(((a.double() @ row - b.double()) ** 2).mean() for a, b in zip(x, y, strict=True))
    penalty = 1e-3 * sum(side.gram_DD / side.tokens for side in sides).diagonal().mean() * (row**2).sum()
    (gradient,) = torch.autograd.grad(error + penalty, row)
    assert gradient.abs().max() < 1e-5


def test_targets_are_above_the_best_and_below_the_chosen() -> None:
    old = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.0, 0.1]])
    assert torch.allclose(targets(old, k=2, new=True), torch.tensor([0.5, 0.2]) + MARGIN)
    assert torch.allclose(targets(old, k=2, new=False), torch.tensor([0.3, 0.1]) - MARGIN)


def test_a_fitted_row_takes_the_new_domain_and_leaves_the_old_ones(folder: Path, dense: list[Path]) -> None:
    """Two domains of different tokens: the new expert is first choice on one and hardly chosen on the other."""
    generator = torch.Generator().manual_seed(1)
    new = [torch.randint(0, 4, (8, 24), generator=generator)]
    old = [torch.randint(100, 104, (8, 24), generator=generator)]
    fitted = load(folder)
    with opened_canonical(dense[3]) as model:
        for round_ in range(2):  # as btx moe does: what a layer sees changes with the layers before it
            rows = fit_rows(fitted, new, old, experts=3)

            def grow(out: Path, moe: Moe, rows: Any = rows) -> None:
                lifecycle.add(out, moe, "law", lifecycle.from_dense(model, moe, "law"), rows.__getitem__)

            fitted = load(change(folder, f"fitted-{round_}", grow))
    assert first_choice(fitted, new[0]) > 0.9
    assert first_choice(fitted, old[0]) < 0.1


@torch.inference_mode()
def first_choice(model: Any, ids: torch.Tensor) -> float:
    """Share of tokens, over all layers, whose first expert is the last one."""
    seen: list[torch.Tensor] = []
    handles = [
        r.register_forward_hook(lambda _m, _i, out: seen.append(out[2][:, 0])) for r in find_routers(model).values()
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return float((torch.cat(seen) == 3).float().mean())
