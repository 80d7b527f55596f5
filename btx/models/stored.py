"""What a checkpoint stores: the tensors of its class by its config, which transformers is asked for."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from btx.checkpoints.names import HEAD
from btx.errors import ArtifactError
from btx.models.families import mixture_family
from btx.models.flops import Shape
from btx.models.model import published


def stored_shapes(native: Any, where: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of a native config stores, a mixture's as published.

    A tied head is left out. ArtifactError for a config of which transformers makes no model.
    """
    family = mixture_family(native)
    try:
        state = Shape(native.to_dict()).model.state_dict()
    except Exception as error:  # the classes raise types of their own
        why = " ".join(str(error).split())
        raise ArtifactError(
            f"{where}: config.json makes no model ({type(error).__name__}: {why}). Correct it."
        ) from error
    tied = {HEAD} if native.tie_word_embeddings else {*()}
    named = published(family, state) if family else state
    return {name: tuple(tensor.shape) for name, tensor in named.items() if name not in tied}


def layers_with_experts(native: Any, where: str) -> tuple[int, ...]:
    """The layers that have experts in a mixture of a native config; errors as in `stored_shapes`."""
    family = mixture_family(native)
    assert family is not None
    one = deepcopy(native)  # whatever the number of experts
    setattr(one, family.experts_field, 1)
    names = stored_shapes(one, where)
    return tuple(n for n in range(native.num_hidden_layers) if family.router_name(n) in names)
