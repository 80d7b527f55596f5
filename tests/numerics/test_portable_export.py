"""An export means the same to transformers 4 and 5, in either layout, and `btx check` finds what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from btx.errors import ArtifactError
from btx.export.portable import NEW, notes, portable_config
from btx.export.proof import check, check_proof, load_stock, logits_of, write_sums
from btx.models.families import DENSE
from tests.portability.exports import ROPES, export
from tests.support.merges import load, logits
from tests.support.models import FAMILIES, config_of


def config_in(folder: Path) -> dict[str, Any]:
    """The parsed config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


OLDER = [family for family in FAMILIES if DENSE[family].moe not in NEW]  # of which transformers 4 knows both


@pytest.mark.parametrize(
    ("family", "rope"), [(f, r) for f in OLDER for r in ROPES if f != "phi3" or r == "default"]
)  # Phi-3 has no other
def test_the_config_has_the_older_fields_and_is_the_same_to_transformers_5(
    tmp_path: Path, family: str, rope: str
) -> None:
    folder = export(tmp_path / "export", family, **ROPES[rope])
    config, before = config_in(folder), config_in(tmp_path / "export-parents" / "moe")
    wanted = dict(before["rope_parameters"])
    assert config["rope_theta"] == wanted.pop("rope_theta")
    assert config.get("rope_scaling") == (None if rope == "default" else wanted)
    assert config["torch_dtype"] == config["dtype"]
    count = DENSE[family].experts_field
    assert config[count] == 3
    assert {"num_local_experts", "num_experts", "moe_num_experts"} & config.keys() == {count}
    assert AutoConfig.for_model(**config).to_dict() == AutoConfig.for_model(**before).to_dict()
    assert torch.equal(logits(load(folder)), logits(load(tmp_path / "export-parents" / "moe")))


@pytest.mark.parametrize(
    ("family", "rope"), [(f, r) for f in FAMILIES if f not in NEW for r in ROPES if f != "phi3" or r == "default"]
)
def test_a_dense_config_has_the_older_fields_too(family: str, rope: str) -> None:
    before = config_of(family, **ROPES[rope]).to_dict()
    config = portable_config(before)
    assert config["rope_theta"] == before["rope_parameters"]["rope_theta"]
    assert ("rope_scaling" in config) == (rope != "default")
    assert AutoConfig.for_model(**config).to_dict() == AutoConfig.for_model(**before).to_dict()


def test_fused_loads_by_the_stock_class_and_passes_the_check(tmp_path: Path, family: str) -> None:
    folder = export(tmp_path / "fused", family, layout="fused")
    assert torch.equal(logits(load(folder)), logits(load(tmp_path / "fused-parents" / "moe")))
    write_sums(folder)
    assert DENSE[family].as_in_memory or any("fused" in line for line in check(folder))


def test_logits_of_nan_are_not_those_of_the_proof(tmp_path: Path) -> None:
    folder = export(tmp_path / "export", "llama")
    net = load_stock(folder)
    assert check_proof(folder, net) < 1e-6
    with torch.no_grad():
        net.lm_head.weight.fill_(float("nan"))
    assert logits_of(net, [1, 2]).isnan().all()
    with pytest.raises(ArtifactError, match="other logits"):
        check_proof(folder, net)


def test_other_families_and_a_head_dim_of_null(tmp_path: Path) -> None:
    other = {"model_type": "gemma", "rope_parameters": {"rope_theta": 1.0}}
    assert portable_config(other) == other
    moe = {"model_type": "mixtral", "head_dim": None, "hidden_size": 32, "num_attention_heads": 4}
    assert portable_config(moe)["head_dim"] == 8
    said = " ".join(notes({**moe, "sliding_window": 16}, "published", tmp_path))
    assert "beyond 16 tokens" in said
    assert "known to load there only" in " ".join(notes(moe, "fused", tmp_path))
    jetmoe = {**moe, "model_type": "jetmoe"}
    assert "known to load there only" not in " ".join(notes(jetmoe, "fused", tmp_path))
    assert "llama.cpp does not support" in " ".join(notes(jetmoe, "published", tmp_path))
    some = {**moe, "model_type": "qwen3_moe", "mlp_only_layers": [0]}
    assert "refuses layers without experts" in " ".join(notes(some, "published", tmp_path))


LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}
LIMITS = [  # as make portability met them, or as the source of the same versions says
    ("olmo2", LLAMA3, "transformers 4 refuses its rope scaling (llama3)"),
    ("olmo2", {"rope_parameters": {"rope_type": "linear"}}, "transformers 4 refuses its rope scaling (linear)"),
    ("olmo2", LLAMA3, "llama.cpp leaves out its rope scaling (llama3)"),
    ("qwen2", LLAMA3, "llama.cpp leaves out its rope scaling (llama3)"),
    ("qwen3", LLAMA3, "llama.cpp leaves out its rope scaling (llama3)"),
    ("qwen3_moe", LLAMA3, "llama.cpp leaves out its rope scaling (llama3)"),
    ("granite", LLAMA3, "llama.cpp's converter refuses its rope scaling (llama3)"),
    ("granitemoe", LLAMA3, "llama.cpp's converter refuses its rope scaling (llama3)"),
    ("mistral", {"sliding_window": 16}, "differs beyond 16 tokens"),
    ("mixtral", {"sliding_window": 16}, "differs beyond 16 tokens"),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, "differs beyond 16 tokens"),
    ("qwen2_moe", {"use_sliding_window": True}, "transformers 4 computes something else"),
    ("flex_olmo", {}, "llama.cpp does not support its family"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "refuses layers without experts"),
    ("cohere2_moe", {"mlp_layer_types": ["dense", "sparse"]}, "does not load layers without experts"),
    ("lfm2_moe", {"use_expert_bias": True, **LLAMA3}, "llama.cpp leaves out its rope scaling (llama3)"),
    ("granitemoe_swa", {"layer_types": ["sliding_attention"], "layer_rope_theta": [5.0]}, "takes one RoPE base"),
]
SLIDING = {"layer_types": ["sliding_attention"], "rope_parameters": {"rope_theta": 5.0}}


def test_granite_with_sliding_layers_and_lfm2_load_in_llama_cpp_where_it_has_what_they_need(tmp_path: Path) -> None:
    plain = {"hidden_size": 32, "num_attention_heads": 4}
    qwen = {"model_type": "qwen2_moe", "norm_topk_prob": False}
    assert "does not renormalise" in " ".join(notes({**plain, **qwen, "norm_topk_prob": True}, "published", tmp_path))
    assert "llama.cpp does not" not in " ".join(notes({**plain, **qwen}, "published", tmp_path))
    tied = {**plain, **qwen, "tie_word_embeddings": True}
    assert "llama.cpp does not load the file" in " ".join(notes(tied, "published", tmp_path))
    for config, bad in (
        ({"model_type": "granitemoe_swa", **SLIDING, "layer_rope_theta": [5.0]}, ""),
        ({"model_type": "granitemoe_swa", "layer_types": ["full_attention"]}, "expects a sliding layer"),
        ({"model_type": "lfm2_moe", "use_expert_bias": True}, ""),
        ({"model_type": "lfm2_moe"}, "no biases on the choice"),
    ):
        said = " ".join(notes({**plain, **config}, "published", tmp_path))
        assert (bad in said) if bad else "llama.cpp takes" not in said
        assert ("does not load its file" in said) == ("no biases" in bad)


@pytest.mark.parametrize(("kind", "field", "said"), LIMITS, ids=lambda x: str(x)[:30])
def test_the_card_says_a_limit_where_it_holds_and_only_there(
    tmp_path: Path, kind: str, field: dict[str, Any], said: str
) -> None:
    config = {"model_type": kind, "hidden_size": 32, "num_attention_heads": 4}
    assert said in " ".join(notes({**config, **field}, "published", tmp_path))
    other = config if field else {**config, "model_type": "mixtral"}
    assert said not in " ".join(notes(other, "published", tmp_path))
    assert said not in " ".join(notes({**config, **LLAMA3, "model_type": "llama"}, "published", tmp_path))


@pytest.mark.parametrize("found", [{"tokenizer_class": "TokenizersBackend"}, {"extra_special_tokens": ["<s>"]}, {}])
def test_the_card_says_when_transformers_4_cannot_read_the_seeds_tokenizer(tmp_path: Path, found: dict) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(found), encoding="utf-8")
    moe = {"model_type": "mixtral", "hidden_size": 32, "num_attention_heads": 4}
    assert ("tokenizer_file=" in " ".join(notes(moe, "published", tmp_path))) == bool(found)
