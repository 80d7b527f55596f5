"""Looks up which dense family becomes which Mixture-of-Experts family (`btx.models.table`), by a model's config.

`btx.models.target` makes the config of such an MoE.
"""

from __future__ import annotations

from typing import Any

from btx.errors import ArtifactError
from btx.models.family import Family
from btx.models.native import native_config
from btx.models.table import ALL, REFUSED, WITH_ATTENTION

DENSE = {family.dense: family for family in ALL}
MOE = {family.moe: family for family in (*ALL, WITH_ATTENTION)}


def parts_within(moe: str) -> dict[str, tuple[str, ...]]:
    """The joined tensors, with their parts, of all dense families that become a type of mixture."""
    return {stored: parts for family in ALL if family.moe == moe for stored, parts in family.parts.items()}


def mixture_family(config: Any) -> Family | None:
    """The family of a Mixture of Experts by its config, parsed or native; None for any other model."""
    values = config if isinstance(config, dict) else config.to_dict()
    family = MOE.get(values["model_type"])
    return family if family and (family.switch is None or values.get(family.switch)) else None


def feed_forward_width(config: dict[str, Any], where: str) -> int:
    """Units of the widest feed-forward block that a dense config has; ArtifactError for a config without a width."""
    width = int(native_config(config, where).intermediate_size)
    if config["model_type"] == "lfm2" and config.get("block_auto_adjust_ff_dim", True):
        multiple = config.get("block_multiple_of", 256)
        width = -(-int(config.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3)) // multiple) * multiple
    if config.get("use_double_wide_mlp") and config.get("num_kv_shared_layers"):
        width *= 2  # of Gemma 4, in the layers that use others' keys and values
    return width


def with_width(config: dict[str, Any], width: int) -> dict[str, Any]:
    """A dense config whose feed-forward blocks are all `width` units wide."""
    found = {**config, "intermediate_size": width}
    found |= {"block_auto_adjust_ff_dim": False} if config["model_type"] == "lfm2" else {}
    return found | ({"use_double_wide_mlp": False} if config.get("use_double_wide_mlp") else {})


def family_of(config: dict[str, Any], where: str, *, attention: bool = False) -> Family:
    """The family of a seed's config; ArtifactError, with the reason, for one that no MoE class holds exactly.

    That of a mixture is its own. `attention` selects the family that has attention experts too.
    """
    kind = config["model_type"]
    if attention and kind in DENSE and not mixture_family(config):
        return _with_attention(config, where)
    if kind in DENSE and not mixture_family(config):
        return DENSE[kind]
    if kind in MOE:
        return _of_mixture(config, where, attention=attention)
    reason = REFUSED.get(kind, "btx has no exact Mixture-of-Experts target for it")
    raise ArtifactError(
        f"{where} is of the family {kind}, which cannot be used: {reason}. Use one of {', '.join(DENSE)}."
    )


def _of_mixture(config: dict[str, Any], where: str, *, attention: bool) -> Family:
    """The family of a mixture as a seed, of which experts of N copies give its output."""
    family, native = MOE[config["model_type"]], native_config(config, where)
    if family.attention or attention:
        raise ArtifactError(
            f"{where} is a Mixture of Experts ({family.moe}), and btx makes no experts of a mixture's attention. Use "
            f"{'another seed' if family.attention else 'merge.experts: per_model'}."
        )
    if family.scores_of(native) == "sigmoid" and not family.normalised(native):
        raise ArtifactError(
            f"{where} is a Mixture of Experts ({family.moe}) whose routing weights are sigmoids, not divided by their "
            "sum (norm_topk_prob: false): of experts of several models, they add up to several times as much. Use a "
            "mixture with norm_topk_prob: true, or a dense seed."
        )
    return family


def _with_attention(config: dict[str, Any], where: str) -> Family:
    native = native_config(config, where)
    why = f"{WITH_ATTENTION.moe}, the one class that has them, is exact for {WITH_ATTENTION.dense} models"
    same = native.num_key_value_heads == native.num_attention_heads  # null stands for as many
    if config["model_type"] == WITH_ATTENTION.dense and same:
        return WITH_ATTENTION
    raise ArtifactError(
        f"{where} cannot have attention experts: {why} with as many key heads as query heads (no grouped-query "
        "attention). Use merge.experts: per_model."
    )
