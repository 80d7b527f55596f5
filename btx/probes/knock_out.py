"""What each expert is worth: the bits per byte of a mixture when no token may be routed to it, in any layer.

Of merged mixtures all experts of a model are one. Its tokens go to the next experts that the router prefers, with the
gate weights that these then have.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from btx.models.opened import ROUTING, Opened, Stock
from btx.probes.bits_per_byte import bits_per_byte, nats
from btx.probes.contract import Data, Found, Probe


def measure(model: Opened, _reference: None, data: Data, _settings: Any) -> Found:
    """By domain the greatest and the least loss of leaving one expert out; a row per domain and expert."""
    assert isinstance(model, Stock)  # as its capabilities say
    assert model.routed
    experts = model.routed.experts // model.routed.each
    rows: list[dict[str, Any]] = []
    numbers = {}
    for domain, documents in data.documents.items():
        sizes = np.array([size for _, size in documents], dtype=float)

        def score(sizes: Any = sizes, documents: Any = documents) -> float:
            return bits_per_byte(nats(model, documents, length=data.length, batch_tokens=data.batch_tokens), sizes)

        whole, lost = score(), []
        for expert in range(experts):
            model.routed.without = expert
            try:
                lost.append(score() - whole)
            finally:
                model.routed.without = None
        rows += [{"domain": domain, "expert": n, "change": change} for n, change in enumerate(lost)]
        numbers[domain] = {"most": max(lost), "least": min(lost), "expert": float(int(np.argmax(lost)))}
    return Found(numbers, rows)


PROBE = Probe(measure, needs=frozenset({ROUTING}))
