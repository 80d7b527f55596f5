"""Makes an export load elsewhere: a config that transformers 4 reads too, either layout of the experts, and notes.

transformers 5 writes some fields of a config under new names only. transformers 4 silently takes its defaults for those
that it does not find, so the older names are written as well; transformers 5 finds the same values in both.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.validate import DTYPES
from btx.checkpoints.writer import TensorSpec, copies
from btx.models.families import DENSE, MOE, mixture_family
from btx.models.family import DOWN, GATE, UP, Family
from btx.models.target import BALANCE

TOKENIZER = "tokenizer_config.json"
OWN_CLASS = "TokenizersBackend"  # transformers 5's class for a tokenizer that tokenizer.json alone defines
UNBALANCED = (
    "Its config states a coefficient of 0 for the balance loss of transformers, and no router logits, so that no "
    "trainer adds that loss unasked to a router that is balanced already; set `output_router_logits: true` and "
    "`router_aux_loss_coef` to train with it."
)
COMPARED = (  # model types whose tensors were compared with the source of vLLM
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "flex_olmo", "granitemoe", "granitemoe_swa", "jetmoe",
    "ernie4_5_moe", "cohere2_moe", "lfm2_moe", "gemma4_text", "hunyuan_v1_moe",
)  # fmt: skip
NOT_IN_LLAMA_CPP = {  # model types that llama.cpp does not compute, whatever their options
    "flex_olmo": "llama.cpp does not support its family.",
    "jetmoe": "llama.cpp does not support its family.",
    "qwen3_5_text": "llama.cpp's converter refuses pico models of this family; real ones were not tried.",
    "qwen3_5_moe_text": "llama.cpp's converter refuses pico models of this family; real ones were not tried.",
    "gemma4_text": "llama.cpp's converter wants a sentencepiece or Llama tokenizer in this family; none was tried.",
    "ernie4_5": "llama.cpp's converter wants a sentencepiece tokenizer in this family; none was tried.",
    "ernie4_5_moe": "llama.cpp's converter wants a sentencepiece tokenizer in this family; none was tried.",
    "hunyuan_v1_moe": "llama.cpp's converter refuses it: it wants a moe_intermediate_size, which the class has not.",
    "cohere2": "llama.cpp's converter refuses it: it wants a rotary_pct, which transformers 5 does not write.",
}
NEW = (  # model types that transformers 4 lacks
    "qwen3_5_text", "qwen3_5_moe_text", "granite_swa", "granitemoe_swa", "cohere2_moe", "lfm2_moe", "gemma4_text",
)  # fmt: skip
OLD_CLASS = "PreTrainedTokenizerFast"  # its name before, which transformers 5 understands


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 with what transformers 4 needs to read the same model; other families' unchanged.

    `rope_parameters` is also there as `rope_theta` and, unless it is the default kind, `rope_scaling`; `dtype` as
    `torch_dtype` (before 4.56); the number of experts under the family's published name alone, since two names could
    come to differ; and a `head_dim` of null, with which transformers 4 cannot compute yarn, as the number that it
    means. transformers' own balance loss is off.
    """
    family = mixture_family(config)
    found = dict(config)
    if family:
        found |= {field: 0.0 for field in BALANCE if field in found}
        found |= {"output_router_logits": False} if "output_router_logits" in found else {}
    if config["model_type"] in NEW or config["model_type"] not in {*DENSE, *MOE}:
        return found
    rope = dict(found.get("rope_parameters") or {})
    if "rope_theta" in rope:
        found["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = rope
    if found.get("dtype"):
        found["torch_dtype"] = found["dtype"]
    if family and "num_local_experts" in found:
        found[family.experts_field] = found.pop("num_local_experts")
    if "head_dim" in found and found["head_dim"] is None:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    return found


def portable_tokenizer(folder: Path) -> None:
    """Give a tokenizer that btx made the class name that transformers 4 knows; not for tokenizers of other origin.

    `model_input_names` is set because transformers 4 would add token type ids, which no model here takes.
    """
    path = folder / TOKENIZER
    found = json.loads(path.read_text(encoding="utf-8"))
    found.pop("backend", None)
    found |= {"tokenizer_class": OLD_CLASS, "model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def rows(source: Checkpoint, layout: str) -> list[TensorSpec]:
    """Every tensor of a Mixture of Experts in a layout: `published` as it is, `fused` as transformers 5 holds it."""
    family = mixture_family(source.config)
    assert family is not None
    return copies(source) if layout == "published" or family.attention else _fused(source, family)


def _fused(source: Checkpoint, family: Family) -> list[TensorSpec]:
    """Experts of a layer as gate_up_proj (E, 2F, D) and down_proj (E, D, F), the router under its name in memory."""
    found, fused = {row.name: row for row in copies(source)}, family.fused
    for name in [n for n in found if n.endswith(family.router)]:
        prefix = name.removesuffix(family.router)
        router = found.pop(name)
        count = router.shape[0]
        for kinds in ((GATE, UP), (DOWN,)):
            names = [prefix + family.expert[k].format(e=e) for e in range(count) for k in kinds]
            row = _joined(source, prefix + fused.expert[kinds[0]], list(dict.fromkeys(names)), count)
            for old in dict.fromkeys(names):
                del found[old]
            found[row.name] = row
        found |= _renamed(router, prefix + fused.router)
        for constant, of in family.constants.items():
            if of.memory:
                found |= _renamed(found.pop(prefix + constant), prefix + of.memory)
    return list(found.values())


def _renamed(row: TensorSpec, name: str) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, row.dtype, row.shape, row.pieces)}


def _joined(source: Checkpoint, target: str, names: list[str], count: int) -> TensorSpec:
    """One tensor of `count` experts, joined from the named tensors in order; a stacked one stays as it is."""
    entry = source.entries[names[0]]
    shape = entry.shape if len(names) == 1 < len(entry.shape) - 1 else (
        count, len(names) // count * entry.shape[0], entry.shape[1]
    )  # fmt: skip
    return TensorSpec(target, DTYPES[entry.dtype], shape, partial(_pieces, source, names))


def _pieces(source: Checkpoint, names: list[str]) -> Any:
    for name in names:
        yield from source.blocks(name)


def notes(config: dict[str, Any], layout: str, folder: Path) -> list[str]:
    """Sentences on where the folder loads and where it is known not to, for its card."""
    made = f"transformers 5 (made with {version('transformers')})"
    family = mixture_family(config)
    if layout == "fused" and not (family and (family.attention or family.as_in_memory)):
        return [
            f"Its experts are stored fused, as {made} holds them: it is known to load there only. transformers 4 would "
            "initialise its experts at random, and other tools expect the published names; export with "
            "`layout: published` for them.",
            *_balance(config),
        ]
    found = [*_limits_of_transformers_4(config, folder), *_vllm(config), *_limits_of_llama_cpp(config, folder)]
    said = [f"It loads in {made} and, unless stated otherwise below, in transformers 4.57.", *found]
    return [*said, *_balance(config)] if family else said


def _balance(config: dict[str, Any]) -> list[str]:
    """What the config says of transformers' own balance loss; the classes of some families have none."""
    return [UNBALANCED] if any(field in config for field in BALANCE) else []


def _own_head_dim(config: dict[str, Any]) -> bool:
    heads = config["num_attention_heads"]
    return bool((config.get("head_dim") or config["hidden_size"] // heads) * heads != config["hidden_size"])


def _rope(config: dict[str, Any]) -> str:
    return str((config.get("rope_parameters") or {}).get("rope_type", "default"))


def _limits_of_transformers_4(config: dict[str, Any], folder: Path) -> list[str]:
    kind, found = config["model_type"], []
    if kind in NEW:
        return ["transformers 4.57 does not know its family, which came with transformers 5."]
    if kind in ("qwen2_moe", "granitemoe") and _own_head_dim(config):
        found.append(f"transformers 4 refuses it: its {kind} has no head_dim of its own.")
    if kind == "qwen2_moe" and config.get("use_sliding_window"):
        found.append("transformers 4 computes something else: there, other layers have the sliding window.")
    if kind == "olmo2" and _rope(config) != "default":
        found.append(f"transformers 4 refuses its rope scaling ({_rope(config)}) in this family.")
    path = folder / TOKENIZER
    named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if named.get("tokenizer_class") == OWN_CLASS or isinstance(named.get("extra_special_tokens"), list):
        found.append(
            f"The tokenizer files are the seed's, byte for byte, and {TOKENIZER} is as transformers 5 writes it, which "
            f"transformers 4 does not read: `{OLD_CLASS}(tokenizer_file='PATH/tokenizer.json')` does there."
        )
    return found


def _vllm(config: dict[str, Any]) -> list[str]:
    """What the source of vLLM 0.33.0 says; tests/numerics/test_names_of_vllm.py has the names and their sources."""
    kind, found = config["model_type"], []
    if kind == "jetmoe":
        return ["vLLM has no model of its own for this family."]
    if kind in ("flex_olmo", "hunyuan_v1_moe"):  # registry.py
        return ["vLLM 0.33.0 has no model of its own for this family and names it among those it runs by transformers."]
    if kind in ("qwen2_moe", "granitemoe", "granitemoe_swa", "lfm2_moe") and _own_head_dim(config):
        found.append("These tensors do not fit vLLM 0.33.0, which has no head_dim of its own in this family.")
    elif mixture_family(config) and kind not in COMPARED:
        found.append("Its tensors were not compared with those that vLLM reads.")
    elif mixture_family(config):
        found.append("vLLM 0.33.0 reads tensors of these names and shapes; that is from its source, it was not run.")
    if kind in ("cohere2_moe", "lfm2_moe") and not config.get("tie_word_embeddings", True):
        found.append("vLLM 0.33.0 computes something else: it ties the head to the embedding in this family.")
    if kind == "cohere2_moe" and "sliding_attention" in (config.get("layer_types") or []):
        found.append("In vLLM 0.33.0 a sliding layer of this family sees one token more than in transformers.")
    if kind == "qwen2_moe" and len(set(config.get("layer_types") or [])) > 1:
        found.append("vLLM 0.33.0 computes something else: it leaves out a sliding window that some layers have.")
    return found


def _of_sliding_granite(config: dict[str, Any]) -> list[str]:
    if "sliding_attention" not in (config.get("layer_types") or []):
        return ["llama.cpp ends with an error on it: in this family it expects a sliding layer."]
    bases = {*(config.get("layer_rope_theta") or [])} - {(config.get("rope_parameters") or {}).get("rope_theta")}
    return ["llama.cpp takes one RoPE base for all layers and computes something else."] if bases else []


def _limits_of_llama_cpp(config: dict[str, Any], folder: Path) -> list[str]:
    """What tests/portability/in_llama_cpp.py found in llama-cpp-python 0.3.36."""
    kind, found = config["model_type"], []
    llama3 = _rope(config) == "llama3"
    if kind in NOT_IN_LLAMA_CPP:
        return [NOT_IN_LLAMA_CPP[kind]]
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) > 1:
        return ["llama.cpp's converter refuses layers without experts in this family."]
    if kind == "cohere2_moe" and "dense" in (config.get("mlp_layer_types") or []):
        return ["llama.cpp does not load layers without experts in this family."]
    if kind == "lfm2_moe" and not config.get("use_expert_bias"):
        return ["llama.cpp does not load its file, which has no biases on the choice of experts."]
    if kind in ("granite_swa", "granitemoe_swa"):
        found += _of_sliding_granite(config)
    if kind in ("granite", "granitemoe") and llama3:
        found.append("llama.cpp's converter refuses its rope scaling (llama3) in this family.")
    if kind == "cohere2_moe" and _rope(config) != "default":
        found.append(f"llama.cpp leaves out its rope scaling ({_rope(config)}) and computes something else.")
    if kind in ("olmo2", "qwen2", "qwen3", "qwen3_moe", "hunyuan_v1_dense", "lfm2", "lfm2_moe") and llama3:
        found.append("llama.cpp leaves out its rope scaling (llama3) in this family and computes something else.")
    if kind == "qwen2_moe" and not config.get("norm_topk_prob") and config.get("tie_word_embeddings"):
        return ["llama.cpp does not load the file."]
    # src/models/qwen2moe.cpp: norm_w is false, and a sigmoid is made as silu(x) / x
    if kind == "qwen2_moe" and config.get("norm_topk_prob"):
        return [
            "llama.cpp does not compute it: in this family it does not renormalise the routing weights and gives NaN "
            "for a shared expert whose gate is zero; with tied embeddings it does not load the file."
        ]
    if config.get("sliding_window") and (kind in ("mistral", "mixtral") or config.get("use_sliding_window")):
        found.append(f"llama.cpp has no sliding window here: it differs beyond {config['sliding_window']} tokens.")
    if not (folder / "tokenizer.model").is_file():
        found.append("llama.cpp's converter refuses byte-level tokenizers that it does not know, such as btx's.")
    return found
