"""Reads a config.json as its stock transformers class does, and compares two of them.

A config class declares its fields; its model reads those, and nothing else but a few names that transformers' shared
code looks up on every config (`ACTING`, and what a family lists as `carried`; a test traces the reads of every family).
So any other key cannot change a logit: it is bookkeeping, which is dropped with a warning.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

from btx.errors import ArtifactError

Config = dict[str, Any]
RECORDED = {"_name_or_path", "transformers_version", "architectures", "model_type", "dtype", "torch_dtype"}

SPELLINGS = {  # older names of declared fields or of parts of one; transformers translates them itself
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "name_or_path",
    "output_attentions",
}
# Names that shared code reads although no dense class declares them, with the values that change nothing.
ACTING: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),  # masks: false, and null too, lets every token attend to later ones
    "per_layer_config": (None,),  # other shapes in some layers
    "text_config": (None,),  # this and the next three point to a nested config
    "decoder": (None,),
    "generator": (None,),
    "text_encoder": (None,),
    "kv_sharing_modes": (None,),  # layers that use the keys and values of others
    "attribute_map": (None,),  # renames fields
    "default_rope_type": ("default",),  # what a RoPE of the default kind is taken for
}
IDLE = {  # declared fields that do not change what trained weights compute; a merged model keeps the seed's
    "attention_dropout",  # acts while training only
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "eod_token_id",
    "initializer_range",
    "max_position_embeddings",  # unless the RoPE type reads it
    "max_window_layers",  # its effect is in `layer_types`
    "pretraining_tp",
    "use_cache",
}
# Fields that the merge reconciles as far as it can, and checks by itself.
EVENED = {"intermediate_size", "vocab_size", "vocab_size_per_layer_input"}
ROUTING = {  # fields of MoE configs alone: number and width of experts, top-k
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_num_experts",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "enable_moe_block",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_num_shared_experts",
    "num_shared_experts",
}
BALANCE = {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}  # they act in training alone
TOLD = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "max_position_embeddings",
)  # idle fields whose differences are reported in a warning
FIXED_ROPES = ("default", "linear", "llama3")  # RoPE types that do not read max_position_embeddings
SAME_ACTIVATION = {"swish": "silu"}


def native_config(config: Config, where: str) -> Any:
    """The transformers config of a parsed config.json; ArtifactError when its class rejects it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**deepcopy(config))
    except Exception as error:  # validators of the config classes raise types of their own
        why = " ".join(str(error).split())
        raise ArtifactError(
            f"{where}: config.json is not a valid {config['model_type']} config ({why}). Correct it."
        ) from error


def declared(native: Any) -> set[str]:
    """The fields that a native config's own class declares, without those that all configs share."""
    from transformers import PreTrainedConfig

    return {f.name for f in fields(type(native))} - {f.name for f in fields(PreTrainedConfig)}


def bookkeeping(config: Config, where: str, carried: tuple[str, ...] = ()) -> list[str]:
    """The keys of a dense config.json that its model does not read, sorted; `carried` are undeclared ones that it does.

    Null and empty keys are left out. ArtifactError for an undeclared key that changes the model all the same.
    """
    from transformers import PreTrainedConfig

    for key, value in config.items():
        if (key in ACTING and key not in carried and value not in ACTING[key]) or callable(
            getattr(PreTrainedConfig, key, None)
        ):
            raise ArtifactError(
                f"{where}: config.json has {key} = {value!r:.80}, with which transformers builds another model than "
                f"the plain {config['model_type']} that btx supports. Use a checkpoint without it."
            )
    kind = type(native_config(config, where))
    same = {name for pair in kind.attribute_map.items() for name in pair}  # two names of one field
    known = {f.name for f in fields(kind)} | same | SPELLINGS | RECORDED | {*carried}
    return sorted(key for key, value in config.items() if key not in known and value not in (None, {}, [], ""))


def told(keys: list[str], where: str, kind: str) -> list[str]:
    """A warning that names the bookkeeping of a config.json, if there is any."""
    if not keys:
        return []
    one = len(keys) == 1
    return [
        f"{where}: config.json has {', '.join(keys)}, which the stock {kind} class of transformers does not declare; "
        f"{'it changes' if one else 'they change'} no logit, and {'is' if one else 'are'} left out of the merged model."
    ]


def config_difference(
    seed: Config, other: Config, where: str, *, carried: tuple[str, ...], names: tuple[str, str] = ("seed", "expert"),
    routing: bool = False,
) -> list[str]:  # fmt: skip
    """The differing fields that decide what a model computes, each as `field: seed's, other's`.

    Both are read by their native class first, so that a default equals the same value stated, and an old spelling the
    new one. All fields decide but those in `IDLE` and `BALANCE`; those in `EVENED` are the caller's, and those in
    `ROUTING` too unless `routing`.
    """
    ours, theirs = names
    if seed["model_type"] != other["model_type"]:
        return [f"model_type: {ours} {seed['model_type']!r}, {theirs} {other['model_type']!r}"]
    left = EVENED | BALANCE | (set() if routing else ROUTING)
    mine, its = (_deciding(c, w, carried, left) for c, w in ((seed, "the seed"), (other, where)))
    fields = sorted(mine.keys() | its.keys())
    if {*mine.get("layer_types", ()), *its.get("layer_types", ())} == {"full_attention"}:
        fields = [f for f in fields if f not in ("sliding_window", "use_sliding_window")]  # which no layer reads
    return [f"{f}: {ours} {mine.get(f)!r}, {theirs} {its.get(f)!r}" for f in fields if mine.get(f) != its.get(f)]


def idle_difference(seed: Config, other: Config, where: str) -> list[str]:
    """A warning for idle fields in which an expert differs from the seed, whose value the merged model keeps."""
    mine, its = native_config(seed, "the seed").to_dict(), native_config(other, where).to_dict()
    found = [f"{f} {its.get(f)!r} (seed {mine.get(f)!r})" for f in TOLD if f in mine and mine.get(f) != its.get(f)]
    return [f"{where} has {', '.join(found)}; the merged model keeps the seed's."] if found else []


def _deciding(config: Config, where: str, carried: tuple[str, ...], left: set[str]) -> Config:
    """The fields of a config that decide what its model computes, without those `left`, in canonical spelling."""
    native = native_config(config, where)
    values = native.to_dict()
    rope = {k: v for k, v in (values.get("rope_parameters") or {}).items() if v is not None and k != "type"}
    idle = IDLE if rope.get("rope_type", "default") in FIXED_ROPES else IDLE - {"max_position_embeddings"}
    found = {f: values.get(f) for f in declared(native) - idle - left}
    found |= {"rope_parameters": rope} if "rope_parameters" in found else {}
    found |= {f: values.get(f) for f in carried if f not in found}
    if "head_dim" in found:
        found["head_dim"] = found["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    if "hidden_act" in found:
        found["hidden_act"] = SAME_ACTIVATION.get(found["hidden_act"], found["hidden_act"])
    return found
