"""Routers made from the domains' data: closed forms, scales, and what they do to tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from btx.checkpoints.reader import opened
from btx.checkpoints.writer import overwrite
from btx.errors import DivergedError
from btx.merge.router_fit import RIDGE
from btx.merge.router_init import Seen, calibrated, fresh_routers, from_activations, scaled
from btx.models.families import DENSE
from btx.moe.hooks import Routed, find_routers
from btx.moe.routing import init_router, mean_entropy
from tests.support.merges import load, merge
from tests.support.models import config_of, save_model

DOMAINS = ("math", "code", "law")


def seen(*domains: Tensor) -> list[Seen]:
    """Router inputs of several domains, in two batches each."""
    found = []
    for x_TD in domains:
        one = Seen()
        one.add(x_TD[:7])
        one.add(x_TD[7:])
        found.append(one)
    return found


def cloud(seed: int, shift: float = 0.0) -> Tensor:
    """Some points around a place."""
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(seed)) + shift * torch.eye(6)[seed]


def test_activation_rows_are_the_ridge_solution_of_telling_domains_apart() -> None:
    clouds = [cloud(n, 2.0) for n in range(3)]
    rows = from_activations(seen(*clouds)).double().requires_grad_()
    gram = sum(x.double().T @ x.double() / len(x) for x in clouds)
    loss = RIDGE * gram.diagonal().mean() * rows.square().sum()
    for number, x in enumerate(clouds):
        target = torch.full((3,), -1 / 3, dtype=torch.float64)
        target[number] += 1
        loss = loss + (x.double() @ rows.T - target).square().mean(0).sum()
    (gradient,) = torch.autograd.grad(loss, rows)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("entropy", [0.3, 0.8, 0.99])
def test_rows_are_scaled_to_the_asked_entropy(entropy: float) -> None:
    domains = seen(*(cloud(n, 2.0) for n in range(3)))
    rows = scaled(from_activations(domains), domains, entropy)
    logits = torch.cat([x for one in domains for x in one.some_TD]) @ rows.T
    assert mean_entropy(logits) / math.log(3) == pytest.approx(entropy, abs=1e-3)


@pytest.mark.parametrize("sharpness", [0.3, 2.0, 9.0])
def test_the_likeliest_scale_is_that_by_which_the_domains_were_drawn(sharpness: float) -> None:
    """Tokens whose domain is drawn from softmax(s W x) are likeliest under s, whatever factor W had before."""
    random = torch.Generator().manual_seed(5)
    rows = torch.randn(3, 6, generator=random)
    x_TD = torch.randn(60_000, 6, generator=random)
    domain_T = torch.multinomial((sharpness * x_TD @ rows.T).softmax(-1), 1, generator=random)[:, 0]
    count = min(int((domain_T == n).sum()) for n in range(3))  # alike, since domains are weighted alike
    found = []
    for n in range(3):
        one = Seen()
        one.some_TD.append(x_TD[domain_T == n][:count])
        found.append(one)
    for factor in (1.0, 50.0):
        made = calibrated(factor * rows, found, [[0], [1], [2]])
        assert float((made / rows).mean()) / sharpness == pytest.approx(1.0, rel=0.13)  # steps are of 2^(1/4)


def test_of_several_experts_of_a_domain_the_probabilities_add_up() -> None:
    """With every row twice, the softmax over domains is what it was."""
    domains = seen(*(cloud(n, 2.0) for n in range(3)))
    rows = from_activations(domains)
    once = calibrated(rows, domains, [[0], [1], [2]])
    twice = calibrated(rows.repeat(2, 1), domains, [[0, 3], [1, 4], [2, 5]])
    torch.testing.assert_close(twice[:3], once)
    assert torch.equal(calibrated(torch.zeros(3, 6), domains, [[0], [1], [2]]), torch.zeros(3, 6))
    seeds = calibrated(torch.cat([rows, 0 * rows[:1]]), [*domains, *seen(cloud(4))], [[0], [1], [2], []])
    assert seeds[:3].any()


def test_full_entropy_is_a_router_of_zeros_and_rows_of_zeros_stay() -> None:
    domains = seen(cloud(0), cloud(1))
    assert not scaled(torch.ones(2, 6), domains, 1.0).any()
    assert not scaled(torch.zeros(2, 6), domains, 0.5).any()


def test_orthogonal_rows_are_at_right_angles_as_the_router_sees_them() -> None:
    norm_D = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.2
    norm_D[3] = 0.0
    rows = init_router(norm_D, experts=5, entropy=0.8, generator=torch.Generator().manual_seed(2), orthogonal=True)
    product = (rows * norm_D) @ (rows * norm_D).T
    torch.testing.assert_close(product, product[0, 0] * torch.eye(5), atol=1e-5, rtol=0)
    plain = init_router(norm_D, experts=5, entropy=0.8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close((plain * norm_D).norm(dim=1), (rows * norm_D).norm(dim=1))


def batches() -> dict[str, list[Tensor]]:
    """Three domains of tokens that do not overlap."""
    generator = torch.Generator().manual_seed(4)
    return {d: [torch.randint(4 * n, 4 * n + 4, (4, 16), generator=generator)] for n, d in enumerate(DOMAINS)}


@pytest.mark.parametrize("how", ["activations", "embeddings"])
def test_routers_from_data_know_whose_expert_is_whose(tmp_path: Path, family: str, how: str) -> None:
    folders = [save_model(tmp_path / str(n), config_of(family), noise=0.01 * n) for n in range(4)]
    out = merge(tmp_path / "moe", folders, top_k=2)
    model = load(out)
    model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("logits, which no router needs"))
    routers = fresh_routers(model, batches(), [*DOMAINS, "seed"], how=how, entropy=0.6)
    assert not any(router[3].any() for router in routers), "the seed's expert has no data, so its row is zeros"
    name = DENSE[family].router_name
    assert overwrite(out, {name(layer): router for layer, router in enumerate(routers)}) == {"model.safetensors"}
    with opened(out) as found:
        assert all(torch.equal(found.read(name(layer)), router) for layer, router in enumerate(routers))
    if how == "activations":
        assert min(own_shares(load(out)).values()) > 0.9
    else:
        table = load(out).get_input_embeddings().weight.detach()
        means = torch.stack([table[some[0]].flatten(0, 1).mean(0) for some in batches().values()])
        centred = means - means.mean(0)
        for router in routers:
            torch.testing.assert_close(router[:3] / router[:3].norm(), centred / centred.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["activations", "embeddings"])
def test_several_experts_of_a_domain_are_all_chosen_by_its_tokens(tmp_path: Path, how: str) -> None:
    out = merge(tmp_path / "moe", [save_model(tmp_path / "seed", config_of("llama"))] * 6, top_k=1)
    owners = [domain for domain in DOMAINS for _ in range(2)]
    model = load(out)
    routers = fresh_routers(model, batches(), owners, how=how, entropy=0.6)
    for router, weight in zip(find_routers(model).values(), routers, strict=True):
        router.weight.data = weight
    with torch.inference_mode(), Routed(model, "switch", 1) as routed:
        counts = torch.zeros(len(DOMAINS), 6)
        for number, some in enumerate(batches().values()):
            model(input_ids=some[0])
            for layer in routed.layers:
                counts[number] += torch.bincount(layer.index_TK.flatten(), minlength=6)
    own = torch.stack([counts[n, 2 * n : 2 * n + 2] for n in range(len(DOMAINS))])
    assert (own > 0).all()
    if how == "activations":
        assert own.sum() / counts.sum() > 0.9
    alike = fresh_routers(model, batches(), owners, how=how, entropy=0.6, together=True)
    assert all(torch.equal(router[0::2], router[1::2]) for router in alike)


@torch.inference_mode()
def own_shares(model: Any) -> dict[str, float]:
    """Share of each domain's tokens, over all layers, whose first expert is its own."""
    found = {}
    with Routed(model, "top_k", 2) as routed:
        for number, (domain, some) in enumerate(batches().items()):
            model(input_ids=some[0])
            first = torch.cat([layer.index_TK[:, 0] for layer in routed.layers])
            found[domain] = float((first == number).float().mean())
    return found


@pytest.mark.parametrize("how", ["activations", "embeddings"])
@pytest.mark.parametrize("weight", [3e38, 1e25])
def test_a_model_that_diverged_is_called_so(tmp_path: Path, how: str, weight: float) -> None:
    """Finite weights may give hidden states that are not, or whose norms overflow so that nothing is left of them."""
    model = load(merge(tmp_path / "moe", [save_model(tmp_path / "seed", config_of("llama"))] * 2, top_k=1))
    model.model.layers[0].self_attn.o_proj.weight.data.fill_(weight)
    with pytest.raises(
        DivergedError, match=f"merge.router: {how} finds inputs of router 0 .* all zero, NaN or infinite"
    ):
        fresh_routers(model, dict(list(batches().items())[:2]), DOMAINS[:2], how=how, entropy=None)


def test_one_domain_alone_makes_no_router(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two domains or more, not 1"):
        fresh_routers(None, {"math": []}, ["math"], how="activations", entropy=0.9)
