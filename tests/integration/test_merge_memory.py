"""The resident memory of a merge is bounded, whatever the size of a model or a tensor."""

from __future__ import annotations

from pathlib import Path

from btx.bench.merge import LLAMA, make_models, ours

SHAPE = LLAMA | {
    "vocab_size": 100_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
MEGABYTE = 2**20


def test_a_merge_takes_less_memory_than_one_tensor(tmp_path: Path) -> None:
    folders = make_models(tmp_path, SHAPE, 4, sparse=True)
    tensor = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2
    spent = ours(folders, tmp_path / "out", hollow=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 500 * MEGABYTE
    assert spent.memory < 160 * MEGABYTE < tensor
