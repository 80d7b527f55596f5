"""Opened models, stock and composed: normalised, causal, and equal with and without the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from btx.conversions import registry
from btx.conversions.registry import open_model
from btx.errors import ArtifactError
from btx.models.composed import Composed
from btx.models.generation import generate
from btx.models.opened import Opened, Stock, opened_checkpoint
from btx.recipe.settings import RunSettings, Settings
from btx.steps.given import ExternalCheckpoint
from btx.steps.model import ComposedStep
from tests.support import moe_models
from tests.support.models import FAMILIES, config_of, save_model

WHERE = RunSettings(device="cpu", threads=1)
CHANCE = torch.Generator().manual_seed(0)
IDS = torch.randint(1, 31, (3, 9), generator=CHANCE)
MODELS = (*FAMILIES, *moe_models.FAMILIES, "granitemoe")


def net_of(name: str, seed: int = 0) -> Any:
    """A pico model of a family, dense or not."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    if name in FAMILIES:
        return AutoModelForCausalLM.from_config(config_of(name, attn_implementation="eager")).eval()
    return moe_models.build(name).eval()


class Weighted(Settings):
    """Settings of the composed model below."""

    weight: float = 0.5


class Both(ComposedStep):
    """The weighted mean of two models' probabilities."""

    kind: ClassVar[str] = "both"
    settings: Weighted

    @staticmethod
    def combine(settings: Weighted, log_probs: dict[str, Tensor], _ids: Tensor) -> Tensor:
        """The logarithm of the mean."""
        one, other = log_probs.values()
        return (settings.weight * one.exp() + (1 - settings.weight) * other.exp()).log()


def opened(name: str) -> Opened:
    """A stock model, or a composed one of two."""
    if name != "composed":
        return Stock(net_of(name))
    parts = {"one": Stock(net_of("llama")), "other": Stock(net_of("qwen2", seed=1))}
    return Composed(parts, lambda log_p, ids: Both.combine(Weighted(weight=0.3), log_p, ids))


@pytest.mark.parametrize("name", [*MODELS, "composed"])
def test_probabilities_are_normalised_and_see_the_prefix_alone(name: str) -> None:
    model = opened(name)
    log_p = model.log_probs(IDS)
    assert log_p.dtype == torch.float32
    assert log_p.exp().sum(-1) == pytest.approx(1.0, abs=1e-5)
    changed = IDS.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % 31
    assert model.log_probs(changed)[:, :5].numpy() == pytest.approx(log_p[:, :5].numpy(), abs=1e-5)
    assert not torch.allclose(model.log_probs(changed)[:, 5:], log_p[:, 5:], atol=1e-3)


@pytest.mark.parametrize("name", [*MODELS, "composed"])
def test_losses_are_those_of_the_probabilities_and_nothing_where_there_is_no_target(name: str) -> None:
    model = opened(name)
    targets = torch.where(torch.rand(IDS.shape, generator=CHANCE) < 0.3, -100, IDS.roll(-1, dims=1))
    wanted = -model.log_probs(IDS).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    found = model.losses(IDS, targets)
    assert found[targets >= 0].numpy() == pytest.approx(wanted[targets >= 0].numpy(), rel=1e-4)
    assert not found[targets < 0].any()


@pytest.mark.parametrize("name", [*MODELS, "composed"])
def test_generation_through_the_cache_is_that_of_whole_passes(name: str) -> None:
    model, whole = opened(name), IDS
    for _ in range(6):
        whole = torch.cat([whole, model.log_probs(whole)[:, -1].argmax(-1)[:, None]], dim=1)
    assert torch.equal(generate(model, IDS, most=6), whole[:, IDS.shape[1] :])


def test_generation_is_that_of_transformers_and_stops_at_an_end() -> None:
    net = net_of("llama")
    model = Stock(net)
    plain = generate(model, IDS, most=8)
    theirs = net.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(plain, theirs[:, IDS.shape[1] :])
    end = int(plain[0, 2])
    stopped = generate(model, IDS[:1], most=8, end=[end])
    assert stopped[0].tolist() == plain[0, : plain[0].tolist().index(end) + 1].tolist()
    both = generate(model, IDS, most=8, end=[end])
    for row, was in zip(both.tolist(), plain.tolist(), strict=True):
        cut = was.index(end) if end in was else len(was)
        assert row[:cut] == was[:cut][: len(row)]
        assert set(row[cut:]) <= {end}
    assert generate(model, IDS, most=0).shape == (3, 0)
    drawn = [generate(model, IDS, most=8, temperature=2.0, random=torch.Generator().manual_seed(n)) for n in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Both:
    """A composed model of two checkpoints, published as a step does it."""
    paths = [save_model(tmp_path / "parts" / f"{n}", config_of("llama"), seed=n) for n in range(2)]
    one, other = (ExternalCheckpoint(content=str(p), path=p, root=tmp_path, where=WHERE, name=p.name) for p in paths)
    step = Both(parts={"one": one, "other": other}, settings=Weighted(weight=0.25), root=tmp_path, where=WHERE)
    step.build(lambda _event: None)
    monkeypatch.setattr(registry, "classes", lambda: {"Both": Both, "ComposedStep": ComposedStep})
    return step


def test_a_composed_model_is_a_small_file_that_opens_like_a_folder(made: Both) -> None:
    assert sum(file.stat().st_size for file in made.folder.glob("*.safetensors")) == 0
    with made.open(where=WHERE, dtype=torch.float32) as model, open_model(made.folder, where=WHERE) as same:
        found = model.log_probs(IDS)
        assert torch.equal(found, same.log_probs(IDS))
        assert not model.capabilities
    ones = []
    for part in made.parts.values():
        with opened_checkpoint(part.folder, where=WHERE) as one:
            ones.append(one.log_probs(IDS).exp())
    assert found.exp().numpy() == pytest.approx((0.25 * ones[0] + 0.75 * ones[1]).numpy(), abs=1e-6)


def test_a_composed_model_whose_part_or_kind_is_gone_is_refused_by_name(
    made: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(about: str) -> None:
        with pytest.raises(ArtifactError, match=about), open_model(made.folder, where=WHERE):
            pass

    monkeypatch.setattr(registry, "classes", dict)
    refused("a kind that this btx does not know: both")
    made.parts["other"].folder.rename(made.root / "elsewhere")
    refused("the part other is not at")
    (made.folder / "model.json").write_text("{}")
    refused("is not a composed model")
