"""Generates text with any opened model, token by token, through its own cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from btx.models.opened import Opened


@torch.inference_mode()
def generate(
    model: Opened, ids_BS: Tensor, *, most: int, end: Collection[int] = (), temperature: float = 0.0,
    random: torch.Generator | None = None, stopped: Callable[[Sequence[int]], bool] | None = None,
) -> Tensor:  # fmt: skip
    """At most `most` new ids (B, N) after prompts of equal length: greedy, or sampled at a `temperature`.

    A sequence that has ended, by an id in `end`, repeats that id; generation stops once all have ended. `stopped` says
    of a sequence's new ids whether it has ended otherwise, such as by a text; it grows until all have, and is to be
    cut.
    """
    found: list[Tensor] = []
    log_p_BV, cache = model.prefill(ids_BS)
    marks = torch.tensor([*end], device=log_p_BV.device, dtype=torch.long)
    done = [False] * len(ids_BS)
    while len(found) < most:
        if temperature:
            new_B = torch.multinomial((log_p_BV / temperature).softmax(-1), 1, generator=random)[:, 0]
        else:
            new_B = log_p_BV.argmax(-1)
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
