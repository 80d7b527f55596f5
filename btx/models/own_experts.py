"""A mixture as the seed: the experts that each of its models brings along, and the mixture that holds those of several.

Its tensors are those of its class by its config, which is asked what it makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from btx.errors import ArtifactError
from btx.models.families import mixture_family
from btx.models.native import bookkeeping, native_config
from btx.models.stored import layers_with_experts
from btx.models.target import BALANCE


@dataclass(frozen=True)
class OwnExperts:
    """The experts that every model brings along where the seed is a mixture.

    N copies of it side by side, their router rows one above another, give its output where a token visits N times as
    many: of N · E logits in which each of E stands N times, the softmax is p / N; the largest N · K are the copies of
    the largest K (unless two experts tie), and normalised weights w become w / N, of N equal experts each. The same
    goes for sigmoids s, which stay s. A bias b on the choice becomes b / N beside p / N, and stays b beside s.
    """

    count: int  # E, in a layer
    visited: int  # K, by a token
    width: int
    layers: tuple[int, ...]  # those with experts
    normalised: bool  # whether the weights of the chosen add up to one. Else w is p, and p / N of N equal experts are p
    # too; but of fewer than N · K experts the weights then add up to less than in the seed


def own_experts(config: dict[str, Any], where: str) -> OwnExperts | None:
    """The experts of a seed that is a mixture, by its parsed config; None for a dense one."""
    family = mixture_family(config)
    if family is None:
        return None
    native = native_config(config, where)
    fields = (family.experts_field, family.top_k_field, family.width_field)
    count, visited, width = (_of_all_layers(native, field, where) for field in fields)
    if visited > count:
        raise ArtifactError(
            f"{where}: config.json has {family.top_k_field} = {visited}, more than the {count} experts. Correct it."
        )
    layers = layers_with_experts(native, where)
    if not layers:
        raise ArtifactError(
            f"{where}: by config.json this {family.moe} has experts in no layer. Correct it, or use a dense checkpoint."
        )
    return OwnExperts(count, visited, width, layers, family.normalised(native))


def _of_all_layers(native: Any, field: str, where: str) -> int:
    """A number that a native config states once, or for every layer alike."""
    found = getattr(native, field)
    values = {*found} if isinstance(found, list) and found else {found}
    if len(values) > 1 or type(one := values.pop()) is not int or one < 1:
        raise ArtifactError(
            f"{where}: config.json has {field} = {found!r:.80}, where a whole number above 0, the same for all layers, "
            "belongs. Use another checkpoint."
        )
    return one


def side_by_side(config: dict[str, Any], where: str, *, models: int, top_k: int) -> Any:
    """The native config of the mixture that holds the experts of several models of a mixture's parsed config.

    A token visits `top_k` times as many as in one of them.
    """
    own, family = own_experts(config, where), mixture_family(config)
    assert own
    assert family
    left_out = {*bookkeeping(config, where, family.carried)}
    made = native_config({key: value for key, value in config.items() if key not in left_out}, where)
    setattr(made, family.experts_field, models * own.count)
    setattr(made, family.top_k_field, top_k * own.visited)
    for field in BALANCE:
        if hasattr(made, field):
            setattr(made, field, 0.0)
    return made
