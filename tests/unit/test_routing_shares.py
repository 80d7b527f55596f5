"""The routing table: every token of every document counts once, and padding never."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from btx.models.opened import Stock
from btx.moe.hooks import Routed
from btx.probes.bits_per_byte import nats
from btx.probes.routing_shares import RoutingShares
from tests.support import moe_models

CHANCE = np.random.default_rng(1)
DOCUMENTS = [(CHANCE.integers(1, 31, n), n) for n in (2, 3, 3, 5, 8, 13, 21)]


@pytest.mark.parametrize("batch_tokens", [1, 16, 1000])
@pytest.mark.parametrize("length", [4, 100])
@pytest.mark.parametrize("family", moe_models.FAMILIES)
def test_the_table_is_that_of_all_tokens_one_document_at_a_time(family: str, length: int, batch_tokens: int) -> None:
    net = moe_models.build(family).eval()
    loads, entropy, count = np.zeros((3, moe_models.E)), np.zeros(3), 0
    with Routed(net, "top_k", 2) as routed:
        shares = RoutingShares(net, routed)
        nats(Stock(net), DOCUMENTS, length=length, batch_tokens=batch_tokens, watch=shares)
        for ids, _ in DOCUMENTS:
            for start in range(0, len(ids) - 1, length):
                window = ids[start : start + length + 1][:-1]
                with torch.no_grad():
                    net(input_ids=torch.from_numpy(window[None]))
                for n, layer in enumerate(routed.layers):
                    loads[n] += np.bincount(layer.index_TK.flatten().numpy(), minlength=moe_models.E)
                    p = layer.logits_TE.double().softmax(-1)
                    entropy[n] -= float((p * p.log()).sum()) / np.log(moe_models.E)
                count += len(window)
    table = shares.table()
    assert table["tokens"] == count == sum(len(ids) - 1 for ids, _ in DOCUMENTS)
    assert np.array(table["layers"]) == pytest.approx(loads / loads.sum(1, keepdims=True))
    assert table["mean"] == pytest.approx((loads / loads.sum(1, keepdims=True)).mean(0))
    assert table["entropy"] == pytest.approx(entropy / count, rel=1e-4)
    assert table["routers"] == ["0", "1", "2"]
