"""Generates text with any opened model, token by token, through its own cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from btx.models.opened import Opened


@torch.inference_mode()
def generate(
    model: Opened, ids_BS: Tensor, *, most: int, end: Collection[int] = (), temperature: float = 0.0,
    top_p: float = 1.0, random: torch.Generator | None = None, stopped: Callable[[Sequence[int]], bool] | None = None,
) -> Tensor:  # fmt: skip
    """At most `most` new ids (B, N) after prompts of equal length: greedy, or sampled at a `temperature`, of the
    likeliest ids that have the probability `top_p` together (nucleus sampling, arXiv 1904.09751).

    A sequence that has ended, by an id in `end`, repeats that id; generation stops once all have ended. `stopped` says
    of a sequence's new ids whether it has ended otherwise, such as by a text; it grows until all have, and is to be
    cut.
    """
    found: list[Tensor] = []
    log_p_BV, cache = model.prefill(ids_BS)
    marks = torch.tensor([*end], device=log_p_BV.device, dtype=torch.long)
    done = [False] * len(ids_BS)
    while len(found) < most:
        new_B = _sampled(log_p_BV / temperature, top_p, random) if temperature else log_p_BV.argmax(-1)
        if found:
            new_B = torch.where(torch.isin(found[-1], marks), found[-1], new_B)
        found.append(new_B)
        ended = torch.isin(new_B, marks).tolist()
        if stopped:
            new = torch.stack(found, dim=1).tolist()
            done = [done[n] or ended[n] or stopped(ids) for n, ids in enumerate(new)]
        if len(found) == most or all(done if stopped else ended):
            break
        log_p_BV, cache = model.decode(new_B, cache)
    return torch.stack(found, dim=1) if found else ids_BS[:, :0]


def _sampled(scores_BV: Tensor, top_p: float, random: torch.Generator | None) -> Tensor:
    """Ids (B,) drawn from the softmax of scores, cut to the nucleus: the fewest ids of `top_p`, one at least."""
    p_BV = scores_BV.softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # what the likelier ids have already
        p_BV = p_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    return torch.multinomial(p_BV, 1, generator=random)[:, 0]
