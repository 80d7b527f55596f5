"""Whether a checkpoint descends from the seed, and how far it has moved from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from btx.checkpoints.reader import Checkpoint, one_thread
from btx.errors import ArtifactError

LEAST_COSINE = 0.3  # between all matrices of an expert and the seed; strangers have about 0


def require_same(seed: Checkpoint, other: Checkpoint, who: str) -> None:
    """ArtifactError that lists the differences unless two checkpoints have the same tensor names and shapes."""
    mine = {n: e.shape for n, e in seed.entries.items()}
    theirs = {n: e.shape for n, e in other.entries.items()}
    wrong = [
        f"{n}: seed {mine.get(n, 'none')}, {who} {theirs.get(n, 'none')}"
        for n in sorted(mine.keys() | theirs.keys())
        if mine.get(n) != theirs.get(n)
    ]
    if wrong:
        raise ArtifactError(
            f"{who} ({other.folder}) is no descendant of the seed ({seed.folder}): {len(wrong)} tensors "
            f"differ in presence or shape, first {'; '.join(wrong[:3])}."
        )


def distances(seed: Checkpoint, others: Mapping[str, Checkpoint]) -> dict[str, dict[str, float]]:
    """`distance` of several models, by name, in parallel threads: reading and arithmetic release the GIL.

    Each runs on one thread: how a sum is split among several decides its last digits, and these are published.
    """
    # torch and its BLAS keep the number of threads per calling thread, so each worker has to set its own.
    with one_thread(), ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return dict(zip(others, pool.map(partial(distance, seed), others.values()), strict=True))


def distance(seed: Checkpoint, other: Checkpoint, *, names: Collection[str] | None = None) -> dict[str, float]:
    """How far a model has moved from the seed, over all matrices or those named: cosine, and |change| / |seed|.

    Independent models have a cosine near 0, descendants near 1. Norm weights are left out: they are all near one.
    """
    dot = mine = theirs = change = 0.0
    for name, entry in seed.entries.items():
        if len(entry.shape) < 2 or (names is not None and name not in names):
            continue
        for a, b in zip(seed.blocks(name), other.blocks(name), strict=True):
            a, b = a.to(torch.float32), b.to(torch.float32)
            dot, mine, theirs = dot + float(a @ b), mine + float(a @ a), theirs + float(b @ b)
            b -= a
            change += float(b @ b)
    return {"cosine": dot / max((mine * theirs) ** 0.5, 1e-30), "change": (change / max(mine, 1e-30)) ** 0.5}
