"""Extracts one expert of a mixture as a dense model, with the shared tensors as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from btx.checkpoints.names import HEAD
from btx.checkpoints.writer import TensorSpec, write_weights
from btx.errors import ArtifactError
from btx.export.lifecycle import cast_blocks
from btx.merge.canonical import joined
from btx.models.family import DOWN, LAYER, Family
from btx.models.mixture import Moe, patterns
from btx.models.native import RECORDED, declared
from btx.models.stored import stored_shapes
from btx.models.target import class_name

SCALE = "routed_scaling_factor"


def extract(out: Path, moe: Moe, name: str) -> None:
    """Write one expert and the shared tensors as a dense model: what the mixture computes if it routes to it alone."""
    number, family = moe.index(name), moe.family
    source = moe.expert(number)
    if moe.dense and moe.width != moe.config["intermediate_size"]:
        raise ArtifactError(
            f"{moe.checkpoint.folder}: its experts are {moe.width} wide, its layers without experts "
            f"{moe.config['intermediate_size']}, and no {family.dense} model has two widths. Nothing can be extracted."
        )
    idle = {*family.shared.names.values(), family.shared.gate or ""} if family.shared else {*()}
    scaled = SCALE in declared(moe.native)  # as LFM2's routing weights are
    factor = float(getattr(moe.native, SCALE)) if scaled else 1.0
    added = {*moe.of_experts, *family.constants, *family.copies, family.input_scale}
    kinds = patterns(family)
    rows: list[TensorSpec] = []
    for tensor, entry in moe.checkpoint.entries.items():
        match = LAYER.fullmatch(tensor)
        prefix, rest = (tensor.removesuffix(match[2]), match[2]) if match else ("", tensor)
        dtype = moe.checkpoint.flat(tensor, 0, 0).dtype
        if rest == family.router:
            for k in kinds:
                own, by = moe.dtype(number, prefix, k), factor if k == DOWN else 1.0
                rows.append(
                    TensorSpec(prefix + k, own, moe.shape(k), partial(cast_blocks, [(source, k)], prefix, own, by))
                )
        elif rest in idle:
            _require_zero(moe, tensor)
        elif rest not in added and not any(p.fullmatch(rest) for p in kinds.values()):
            rows.append(TensorSpec(tensor, dtype, entry.shape, partial(moe.checkpoint.blocks, tensor)))
    config, named = dense_config(family, moe.config), joined(family, rows)
    if more := {row.name for row in named} - {*stored_shapes(config, str(moe.checkpoint.folder)), HEAD}:
        raise ArtifactError(
            f"{moe.checkpoint.folder}: every token also goes through {min(more)}, which a {family.dense} model does "
            "not have. Nothing can be extracted."
        )
    write_weights(out, named)
    config.save_pretrained(out)


def dense_config(family: Family, moe: dict[str, Any]) -> Any:
    """The native dense config of one expert as a model; `moe` is the mixture's parsed config.json."""
    from transformers import AutoConfig

    source = AutoConfig.for_model(**moe).to_dict()
    known = AutoConfig.for_model(family.dense).to_dict().keys() | set(family.carried)
    kept = {k: v for k, v in source.items() if k in known and k not in (*RECORDED, "intermediate_size")}
    kept |= {**family.extracted, "intermediate_size": source[family.width_field]}
    if "head_dim" in known and kept.get("head_dim") is None:  # where classes differ in what they take it for
        kept["head_dim"] = source["hidden_size"] // source["num_attention_heads"]
    config = AutoConfig.for_model(family.dense, **kept)
    config.dtype = source.get("dtype")
    config.architectures = [class_name(config)]
    return config


def _require_zero(moe: Moe, tensor: str) -> None:
    if tensor.endswith("down_proj.weight") and any(bool(block.any()) for block in moe.checkpoint.blocks(tensor)):
        raise ArtifactError(
            f"{moe.checkpoint.folder}: {tensor} is not zero, so every token also visits a shared expert, which a "
            f"{moe.family.dense} model does not have. Only folders whose shared expert is zero can be made dense."
        )
