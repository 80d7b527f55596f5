"""The config of the Mixture of Experts that holds a dense model exactly, made field by field.

A field that both classes declare is copied, one that the dense class alone declares must have a value under which it
does nothing, and anything else is refused by name. Keys that the dense class does not declare are not fields of the
model: its stock logits do not depend on them, so they are dropped, also where the MoE class declares one of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btx.errors import ArtifactError
from btx.models.families import DENSE, family_of, mixture_family
from btx.models.family import IDLE_WIDTH, Family
from btx.models.native import bookkeeping, declared, native_config, told

BALANCE = ("router_aux_loss_coef", "aux_loss_coef")  # of transformers' own balance loss: 0, so that no trainer adds it
# by default to a model that is balanced already


def moe_config(
    dense: dict[str, Any], *, experts: int, top_k: int, width: int, where: str, dense_layers: Sequence[int] = (),
    shared_width: int = IDLE_WIDTH, shared: int = 0, attention: bool = False,
) -> Any:  # fmt: skip
    """The native MoE config that gives a dense model's logits when all experts are that model.

    `dense` is the parsed config.json; `width` an expert's feed-forward width, `dense_layers` those without experts,
    `shared_width` that of the shared expert where the family has one, of which `shared` are live, `attention` as in
    `family_of`. ArtifactError
    names the field when the dense model uses something that the MoE class does not have.
    """
    from transformers import AutoConfig

    family = family_of(dense, where, attention=attention)
    bookkeeping(dense, where, family.carried)
    native, empty = native_config(dense, where), AutoConfig.for_model(family.moe)
    fields = declared(native) | {*family.carried}
    source = {family.renamed.get(k, k): v for k, v in native.to_dict().items() if k in fields}
    known = declared(empty) | {*family.carried, *family.derived}
    _refuse_unknown(family, source, known, where)
    if not family.rotates_parts:
        source["rope_parameters"] = _of_whole_heads(source.get("rope_parameters") or {}, family, where)
    kept = {k: v for k, v in source.items() if k in known and k not in family.derived}
    if "head_dim" in known and kept.get("head_dim") is None:
        kept["head_dim"] = native.hidden_size // native.num_attention_heads
    kept |= {**family.fixed, family.experts_field: experts, family.width_field: width, family.top_k_field: top_k}
    kept |= {field: 0.0 for field in BALANCE if field in known}
    if dense_layers:
        kept["mlp_only_layers"] = list(dense_layers)
    if family.shared and family.shared.count_field:
        kept[family.shared.count_field] = shared
    if family.shared and family.shared.width_field:
        kept[family.shared.width_field] = shared_width
    return AutoConfig.for_model(family.moe, **kept)


def _of_whole_heads(rope: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """RoPE parameters without the part of a head that is rotated, which must be all of it.

    llama.cpp's converter does not understand a part of 1.
    """
    part = rope.get("partial_rotary_factor", 1.0)
    if part not in (None, 1.0):
        raise ArtifactError(
            f"{where}: config.json has partial_rotary_factor = {part!r}, and {family.moe} rotates whole heads, so the "
            "merged model would compute something else."
        )
    return {key: value for key, value in rope.items() if key != "partial_rotary_factor"}


def class_name(config: Any) -> str:
    """Name of a native config's stock class, from transformers' own table: importing the class takes a second."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def warnings_of(config: dict[str, Any], where: str, *, sees_images: bool) -> list[str]:
    """Warnings about a model before it is merged: keys of its config.json that are not fields of the model, and
    what else the checkpoint has."""
    kind = config["model_type"]
    family = mixture_family(config) or DENSE.get(kind)
    if family is None:
        return []  # `family_of` refuses it
    sees = [f"{where} sees images too; the merged model is made of its language model alone."] if sees_images else []
    return sees + told(bookkeeping(config, where, family.carried), where, kind)


def _refuse_unknown(family: Family, source: dict[str, Any], known: set[str], where: str) -> None:
    for key, value in source.items():
        if key in known:
            continue
        allowed = family.harmless.get(key, ())
        items = value if isinstance(value, list) else [value]
        if allowed is not None and any(item not in allowed for item in items):
            raise ArtifactError(
                f"{where}: config.json has {key} = {value!r}, which {family.moe} does not support, so "
                "the merged model would compute something else."
            )
