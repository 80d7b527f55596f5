"""Checkpoints read and written tensor by tensor: the bytes of safetensors itself; malformed files are refused."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from btx.checkpoints.carried import CARRIED
from btx.checkpoints.layouts import SINGLE
from btx.checkpoints.reader import (
    Checkpoint,
    carry_files,
    count_non_finite,
    opened,
    require_finite,
)
from btx.checkpoints.validate import read_header
from btx.errors import ArtifactError
from tests.support.models import config_of, save_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama."""
    return save_model(tmp_path_factory.mktemp("model"), config_of("llama"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_entries_are_counted_also_where_a_sum_would_hide_them(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert count_non_finite(torch.full((9,), largest, dtype=dtype)) == 0
    assert count_non_finite(torch.tensor([largest, -largest, 0.0], dtype=dtype)) == 0
    assert count_non_finite(torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=dtype)) == 3
    assert count_non_finite(torch.zeros(0, dtype=dtype)) == 0


def test_the_first_tensor_with_a_nan_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"][3] = torch.nan
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / SINGLE)
    with opened(tmp_path) as found, pytest.raises(ArtifactError, match=r"who .*: model\.norm\.weight holds 1 NaN"):
        require_finite(found, "who")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_with_any_damage_to_its_header_or_length_is_refused_or_reads_whole(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, data: Any
) -> None:
    whole = (folder / SINGLE).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    at = data.draw(st.integers(0, end - 1))
    flip = data.draw(st.integers(1, 255))
    length = data.draw(st.sampled_from([len(whole), len(whole) - 1, at, len(whole) // 2]))
    out = tmp_path_factory.mktemp("out")
    (out / SINGLE).write_bytes((whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])[:length])
    (out / "config.json").write_text('{"model_type": "x"}')
    with suppress(ArtifactError), opened(out) as found:  # any other error would fail the test
        assert length == len(whole)
        for name, entry in found.entries.items():
            assert tuple(found.read(name).shape) == entry.shape


def test_a_header_that_lies_about_its_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    with path.open("wb") as file:  # sparse: 300 MB that take no room
        file.write(struct.pack("<Q", 200 * 2**20))
        file.truncate(300 * 2**20)
    with pytest.raises(ArtifactError, match="claims 209715200 bytes"):
        read_header(path)


def test_rotary_buffers_of_older_checkpoints_are_no_weights(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, name: torch.arange(4)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert Checkpoint(tmp_path).entries.keys() == tensors.keys()


def test_the_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    sizes = {"a": (torch.bfloat16, 9), "b": (torch.float32, 4), "c": (torch.bfloat16, 1)}
    save_file({name: torch.zeros(size, dtype=dtype) for name, (dtype, size) in sizes.items()}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert Checkpoint(tmp_path).dtype is torch.bfloat16


def test_the_digest_follows_config_tokenizer_and_weights_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    digest = Checkpoint(folder).digest()
    assert Checkpoint(tmp_path).digest() == digest
    (tmp_path / "README.md").write_text("about")
    assert Checkpoint(tmp_path).digest() == digest
    for name in ("config.json", "tokenizer.json", SINGLE):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if name == SINGLE else whole + b"\n")
        assert Checkpoint(tmp_path).digest() != digest
        (tmp_path / name).write_bytes(whole)
    assert Checkpoint(tmp_path).digest() == digest


def test_only_named_files_are_carried_over_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    carry_files(folder, tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {p.name for p in folder.iterdir()} & set(CARRIED)
    assert "tokenizer.json" in names
    assert all((tmp_path / n).read_bytes() == (folder / n).read_bytes() for n in names)
