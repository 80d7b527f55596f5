"""The order of training data: permutations, exact shares, whole epochs, and independence of micro-batching."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from btx.data.packed import Tokens
from btx.data.sampler import IGNORED, Stream, apportion, key_of, permuted
from btx.errors import RecipeError
from btx.graph.artifact import write_json

KEYS = st.integers(0, 2**64 - 1)
WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1e300), min_size=1).filter(lambda w: any(w.values()))


@given(length=st.integers(1, 2000), key=KEYS)
def test_permuted_is_a_permutation_of_any_length_under_any_key(length: int, key: int) -> None:
    assert sorted(permuted(np.arange(length), length, key)) == list(range(length))


@given(length=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_permuted_stays_in_a_range_of_any_size_and_tells_places_apart(length: int, key: int, data: Any) -> None:
    places = data.draw(st.lists(st.integers(0, length - 1), unique=True, min_size=1, max_size=20))
    out = permuted(np.array(places), length, key)
    assert len(set(out.tolist())) == len(places)
    assert all(0 <= x < length for x in out.tolist())


@given(length=st.integers(2, 500), key=KEYS, data=st.data())
def test_permuted_of_a_part_is_the_part_of_permuted(length: int, key: int, data: Any) -> None:
    part = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=10)), dtype=np.int64)
    assert np.array_equal(permuted(part, length, key), permuted(np.arange(length), length, key)[part])


def test_permuted_leaves_no_trace_of_the_order() -> None:
    out = permuted(np.arange(10_000), 10_000, key_of("some", "key"))
    assert abs(np.corrcoef(np.arange(10_000), out)[0, 1]) < 0.05
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.05


@given(total=st.integers(0, 10**15), weights=WEIGHTS)
def test_apportioned_counts_add_up_and_lie_within_one_of_their_share(total: int, weights: dict[str, float]) -> None:
    counts = apportion(total, weights)
    assert sum(counts.values()) == total
    whole = sum(map(Fraction, weights.values()))
    assert all(abs(counts[n] - total * Fraction(w) / whole) < 1 for n, w in weights.items())


@given(parts=st.lists(st.text("abc", max_size=3), min_size=2, max_size=2, unique=True))
def test_keys_depend_on_every_part_and_on_their_places(parts: list[str]) -> None:
    assert key_of(*parts) != key_of(*parts[::-1])
    assert key_of(*parts) != key_of(parts[0], parts[1], "")


def tokens_of(folder: Path, ids: list[int], mask: list[int] | None = None) -> Tokens:
    """A tokens folder with these ids to train on."""
    folder.mkdir(parents=True)
    (folder / "train.bin").write_bytes(np.asarray(ids, "<u4").tobytes())
    (folder / "valid.bin").touch()
    if mask is not None:
        (folder / "train.mask").write_bytes(bytes(mask))
    write_json(folder / "tokens.json", {"dtype": "<u4", "masked": mask is not None, "valid": []})
    return Tokens(folder)


LENGTH = 4
SIZES = {"a": 5, "b": 1, "c": 12}  # sequences of each domain


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokens]:
    """Domains whose every id encodes domain and position, with a remainder too short for a sequence."""
    root = tmp_path_factory.mktemp("tokens")
    return {
        name: tokens_of(root / name, [1000 * n + i for i in range(LENGTH * SIZES[name] + 1 + n)])
        for n, name in enumerate(SIZES)
    }


def visits(stream: Stream, cuts: list[range]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the run, in batches of these numbers."""
    batches = [stream.batch(numbers) for numbers in cuts]
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


def cut(total: int, size: int, start: int = 0) -> list[range]:
    """Numbers from start to total in batches of this size."""
    return [range(a, min(a + size, total)) for a in range(start, total, size)]


def stream_of(domains: dict[str, Tokens], sequences: int, seed: int, **weights: float) -> Stream:
    """A run over all domains, equally weighted unless said."""
    weights = weights or dict.fromkeys(domains, 1.0)
    return Stream(domains, weights=weights, sequences=sequences, length=LENGTH, seed=seed)


@settings(max_examples=40)
@given(sequences=st.integers(1, 90), seed=st.integers(0, 99), weight=st.floats(0.0, 9.0))
def test_a_run_visits_each_domain_as_often_as_apportioned_and_each_sequence_once_an_epoch(
    domains: dict[str, Tokens], sequences: int, seed: int, weight: float
) -> None:
    stream = stream_of(domains, sequences, seed, a=1.0, b=weight, c=2.5)
    inputs, targets = visits(stream, cut(sequences, 7))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    firsts = inputs[:, 0].tolist()
    for n, (name, number) in enumerate(SIZES.items()):
        seen = [first - 1000 * n for first in firsts if first // 1000 == n]
        assert len(seen) == stream.counts[name]
        times = [seen.count(place * LENGTH) for place in range(number)]
        assert sum(times) == len(seen)
        assert {*times} <= {len(seen) // number, -(-len(seen) // number)}


@settings(max_examples=30)
@given(sequences=st.integers(1, 60), size=st.integers(1, 60), start=st.integers(0, 59), seed=st.integers(0, 9))
def test_a_run_is_the_same_however_its_batches_are_cut_and_wherever_it_resumes(
    domains: dict[str, Tokens], sequences: int, size: int, start: int, seed: int
) -> None:
    start = min(start, sequences - 1)
    inputs, targets = visits(stream_of(domains, sequences, seed), [range(sequences)])
    again = visits(stream_of(domains, sequences, seed), cut(sequences, size, start))
    assert torch.equal(inputs[start:], again[0])
    assert torch.equal(targets[start:], again[1])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_sequences_of_a_domain_are_dealt_out_to_its_experts(domains: dict[str, Tokens], parts: int) -> None:
    firsts: list[int] = []
    for part in range(parts):
        one = {"c": domains["c"]}
        stream = Stream(one, weights={"c": 1.0}, sequences=1, length=LENGTH, seed=part, part=(part, parts))
        count = stream.available["c"]
        epoch = Stream(one, weights={"c": 1.0}, sequences=count, length=LENGTH, seed=part, part=(part, parts))
        firsts.extend(visits(epoch, cut(count, 3))[0][:, 0].tolist())
    assert sorted(firsts) == [2000 + LENGTH * place for place in range(SIZES["c"])]


def test_another_seed_gives_another_order_of_the_same_sequences(domains: dict[str, Tokens]) -> None:
    one, other = (visits(stream_of(domains, 18, seed, a=5, b=1, c=12), cut(18, 5))[0] for seed in (0, 1))
    assert not torch.equal(one, other)
    assert sorted(one.tolist()) == sorted(other.tolist())


def test_targets_that_are_not_learned_are_the_masked_ones(tmp_path: Path) -> None:
    ids, mask = list(range(9)), [1, 0, 1, 1, 0, 0, 1, 0, 1]
    stream = stream_of({"a": tokens_of(tmp_path / "a", ids, mask)}, 2, 0)
    inputs, targets = visits(stream, [range(2)])
    assert stream.masked
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert target == [i + 1 if mask[i + 1] else IGNORED for i in row]


@pytest.mark.parametrize("ids", [0, 1, LENGTH])
def test_a_domain_shorter_than_one_sequence_is_refused_unless_it_is_not_asked_for(tmp_path: Path, ids: int) -> None:
    both = {"a": tokens_of(tmp_path / "a", [0] * (LENGTH + 1)), "b": tokens_of(tmp_path / "b", [0] * ids)}
    with pytest.raises(RecipeError, match=rf"domain b has {ids} tokens, less than one sequence of {LENGTH}"):
        stream_of(both, 4, 0)
    assert visits(stream_of(both, 4, 0, a=1.0, b=0.0), [range(4)])[0].shape == (4, LENGTH)
