"""Sorts token-choices by expert, the order in which every grouped kernel works.

S = T · K choices; choice t · K + k is token t's k-th. An index of E or more stands for an expert that is elsewhere
(expert parallelism marks choices of other processes so): such choices come last, in no expert's run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Choices sorted by expert, stably, so that sums keep their order from run to run."""

    choice_S: Tensor  # the choice at each sorted place
    place_S: Tensor  # the sorted place of each choice
    ends_E: Tensor  # where each expert's run of places ends; the first begins at 0


def order(index_TK: Tensor, experts: int) -> Order:
    """Sort the choices of a routing, on its device and without synchronising with it."""
    expert_S = index_TK.reshape(-1)
    sorted_S, choice_S = expert_S.sort(stable=True)
    place_S = torch.empty_like(choice_S)
    place_S[choice_S] = torch.arange(len(choice_S), device=choice_S.device)
    ends_E = torch.searchsorted(sorted_S, torch.arange(experts, device=choice_S.device), right=True)
    return Order(choice_S, place_S, ends_E)
