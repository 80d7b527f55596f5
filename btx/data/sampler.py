"""The order of training data: a pure function of (seed, step), so one integer is all there is to resume.

Each domain's tokens are cut into sequences. A keyed permutation of all sequence numbers of the run (a Feistel
network with cycle walking) says which domain comes when, in exactly the requested shares, and another one, per domain
and epoch, which of its sequences. Nothing is stored or shuffled in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from btx.data.packed import Tokens
from btx.errors import RecipeError

IGNORED = -100  # the target that cross-entropy ignores
FAR = 4096  # tokens
_ROUNDS = 6


def key_of(*parts: object) -> int:
    """A 64-bit key that depends on all parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8])


def permuted(index: NDArray[np.int64], length: int, key: int) -> NDArray[np.int64]:
    """Where each index in [0, length) goes under the keyed permutation of that range.

    A balanced Feistel network over the next even number of bits, applied again to what falls outside the range
    (cycle walking; Black and Rogaway 2002).
    """
    half = max((max(length - 1, 1).bit_length() + 1) // 2, 1)
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(key_of(key, r)) for r in range(_ROUNDS)]
    out = index.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> np.uint64(half), out[todo] & low
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & low)
        out[todo] = (left << np.uint64(half)) | right
        todo = todo[out[todo] >= length]
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Split `total` in proportion to the weights, exactly, by largest remainders."""
    whole = sum(map(Fraction, weights.values()))
    exact = {n: total * Fraction(w) / whole for n, w in weights.items()}
    counts = {n: int(x) for n, x in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


@dataclass(frozen=True)
class Batch:
    """Inputs and targets, both (sequences, sequence_length) int64; a target of IGNORED has no loss."""

    inputs: torch.Tensor
    targets: torch.Tensor
    numbers: range = range(0)  # which sequences of the run they are


class Stream:
    """The sequences of a whole run over one or more domains."""

    def __init__(
        self, tokens: Mapping[str, Tokens], *, weights: Mapping[str, float], sequences: int, length: int, seed: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        """`part` (n, N): only every N-th sequence of each domain is used, from the n-th on."""
        self.tokens, self.sequences, self.length, self.seed, self.part = tokens, sequences, length, seed, part
        self.counts = apportion(sequences, weights)
        self.available = {n: len(range(part[0], (len(t.train) - 1) // length, part[1])) for n, t in tokens.items()}
        for name, number in self.available.items():
            if number < 1 and self.counts[name]:
                raise RecipeError(
                    f"domain {name} has {len(tokens[name].train)} tokens, less than one sequence of {length} for each "
                    f"of {part[1]} trainings. Give it more data, or a shorter sequence_length."
                )

    @property
    def masked(self) -> bool:
        """Whether some targets have no loss."""
        return any(t.mask is not None for t in self.tokens.values())

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs over each domain's sequences."""
        return {n: round(c / max(self.available[n], 1), 3) for n, c in self.counts.items()}

    def batch(self, numbers: range) -> Batch:
        """The sequences with these numbers in the run."""
        places = permuted(np.arange(numbers.start, numbers.stop), self.sequences, key_of(self.seed, "mixture"))
        rows = [self._row(int(place)) for place in places]
        inputs = torch.from_numpy(np.stack([ids[:-1] for ids, _ in rows]))
        targets = torch.from_numpy(np.stack([t for _, t in rows]))
        return Batch(inputs, targets, numbers)

    def prompts(self, numbers: range) -> torch.Tensor:
        """Places (sequences, sequence_length, 2) of the inputs in their prompts: how many tokens of the prompt come
        before, and how many after, each -1 outside of prompts. A prompt is a run of tokens without a loss, of which
        a sequence may hold a part."""
        found = []
        for place in permuted(np.arange(numbers.start, numbers.stop), self.sequences, key_of(self.seed, "mixture")):
            name, draw = self._drawn(int(place))
            mask = self.tokens[name].mask
            outside = np.full((self.length, 2), -1)
            found.append(outside if mask is None else places_in_runs(mask, self._start(name, draw), self.length))
        return torch.from_numpy(np.stack(found))

    def _row(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._sequence(*self._drawn(place))

    def _drawn(self, place: int) -> tuple[str, int]:
        """The domain of a place in the run, and which of its draws it is."""
        for name, count in self.counts.items():
            if place < count:
                return name, place
            place -= count
        raise AssertionError("a place outside of the run")

    def _start(self, name: str, draw: int) -> int:
        """Where the sequence of a draw begins in its domain's tokens."""
        number = self.available[name]
        epoch, place = divmod(draw, number)
        drawn = int(permuted(np.array([place]), number, key_of(self.seed, name, epoch))[0])
        return (self.part[0] + drawn * self.part[1]) * self.length

    def _sequence(self, name: str, draw: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        at = self._start(name, draw)
        ids = self.tokens[name].train[at : at + self.length + 1].astype(np.int64)
        targets = ids[1:].copy()
        mask = self.tokens[name].mask
        if mask is not None:
            targets[mask[at + 1 : at + self.length + 1] == 0] = IGNORED
        return ids, targets


def places_in_runs(mask: NDArray[np.uint8], at: int, length: int) -> NDArray[np.int64]:
    """Places (length, 2) of the tokens from `at` on in their runs of zeros: zeros before and after, -1 where not 0.

    Runs are looked at beyond the window, as far as `FAR` tokens.
    """
    first = max(0, at - FAR)
    zero = np.asarray(mask[first : at + length + FAR]) == 0
    index = np.arange(len(zero))
    before = index - np.maximum.accumulate(np.where(zero, -1, index)) - 1
    after = np.minimum.accumulate(np.where(zero, len(zero), index)[::-1])[::-1] - index - 1
    found = np.where(zero[:, None], np.stack([before, after], axis=1), -1)
    return found[at - first : at - first + length]
