"""A model composed of others, which stay unchanged: a small file that names their checkpoints by digest and path."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx.errors import ArtifactError
from btx.graph.artifact import write_json
from btx.models.opened import Opened

FILE = "model.json"
Combine = Callable[[dict[str, Tensor], Tensor], Tensor]
"""Maps the parts' log-probabilities (B, K, V), of the last K positions of ids (B, S), to scores (B, K, V) of the whole.

The scores are normalised afterwards. Those of a position may depend on the ids up to it, and on no later one.
"""


class Composed(Opened):
    """Combines the next-token distributions of several models, over the ids that all of them have."""

    def __init__(self, parts: Mapping[str, Opened], combine: Combine) -> None:
        self.parts, self.combine = dict(parts), combine

    @property
    def device(self) -> torch.device:
        """The device of the first part, and of all."""
        return next(iter(self.parts.values())).device

    @property
    def positions(self) -> int | None:
        """The fewest of any part."""
        return min((part.positions for part in self.parts.values() if part.positions is not None), default=None)

    def log_probs(self, ids_BS: Tensor, prompt: int = 0) -> Tensor:
        """Log-probabilities of the combination."""
        return self._combined({name: part.log_probs(ids_BS, prompt) for name, part in self.parts.items()}, ids_BS)

    def prefill(self, ids_BS: Tensor) -> tuple[Tensor, Any]:
        """Prefill of every part, combined; the cache has the ids so far and the parts' caches by name."""
        return self._next({name: part.prefill(ids_BS) for name, part in self.parts.items()}, ids_BS)

    def decode(self, ids_B: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """One token through every part, combined."""
        seen_BS, caches = cache
        ids_BS = torch.cat([seen_BS, ids_B[:, None]], dim=1)
        return self._next({name: part.decode(ids_B, caches[name]) for name, part in self.parts.items()}, ids_BS)

    def _next(self, found: dict[str, tuple[Tensor, Any]], ids_BS: Tensor) -> tuple[Tensor, Any]:
        log_p = self._combined({name: log_p[:, None] for name, (log_p, _) in found.items()}, ids_BS)
        return log_p[:, 0], (ids_BS, {name: cache for name, (_, cache) in found.items()})

    @torch.inference_mode()
    def _combined(self, log_p: dict[str, Tensor], ids_BS: Tensor) -> Tensor:
        common = min(found.shape[-1] for found in log_p.values())
        cut = {name: found[..., :common].log_softmax(-1) for name, found in log_p.items()}
        return self.combine(cut, ids_BS).float().log_softmax(-1)


def describe(out: Path, home: Path, *, kind: str, parts: Mapping[str, tuple[Path, str]], settings: Any) -> None:
    """Write a composed model's file into `out`, which will be moved to `home`; `parts` are folders and digests."""
    named = {
        name: {"path": os.path.relpath(folder, home), "digest": digest} for name, (folder, digest) in parts.items()
    }
    write_json(out / FILE, {"kind": kind, "parts": named, "settings": settings})


def described(folder: Path) -> tuple[str, dict[str, Path], dict[str, Any]]:
    """Kind, folders of the parts and settings of a composed model; ArtifactError where its file or a part is missing.

    The parts' digests are not checked: hashing the parts takes as long as reading them.
    """
    try:
        said = json.loads((folder / FILE).read_text(encoding="utf-8"))
        parts = {name: (folder / part["path"]).resolve() for name, part in said["parts"].items()}
        kind, settings = str(said["kind"]), dict(said["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / FILE} is not a composed model ({error!r:.200}). Make it again.") from error
    if gone := [name for name, path in parts.items() if not path.is_dir()]:
        raise ArtifactError(
            f"{folder / FILE}: the part {gone[0]} is not at {parts[gone[0]]}. Put it there, or make the model again."
        )
    return kind, parts, settings
