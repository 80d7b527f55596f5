"""The held-out split: by the hash of the source document over all files, large enough, and never trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btx.data import split as splitting
from btx.data.corpus import Counts, read
from btx.data.split import Split
from btx.recipe.recipe import Recipe
from btx.recipe.settings import DataSettings
from tests.support.world import World, write_jsonl


def sha(text: str) -> int:
    """The full hash of a text, by which documents are ordered."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def parts(split: Split) -> tuple[list[str], list[str], list[str]]:
    """The texts of train, test and select."""
    trained = [d.text for d in split.train()]
    return trained, [h.document.text for h in split.test], [h.document.text for h in split.select]


def domain(folder: Path, texts: Iterable[str], name: str = "data", **more: Any) -> Split:
    """The split of a domain with these documents in one file."""
    path = folder / f"{name}.jsonl"
    write_jsonl(path, [{"text": t} for t in texts])
    return Split([str(path)], [], DataSettings(**more))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 60), copies=st.integers(1, 3), holdout=st.sampled_from([0, 1e-6, 0.05, 0.4]),
    select=st.sampled_from([0, 0.05, 0.3]),
)  # fmt: skip
def test_the_sides_are_the_smallest_hashes_in_order_and_equal_texts_stay_together(
    tmp_path_factory: pytest.TempPathFactory, count: int, copies: int, holdout: float, select: float
) -> None:
    texts = [f"document {n}" for n in range(count)] * copies
    trained, test, chosen = parts(
        domain(tmp_path_factory.mktemp("d"), texts, holdout=holdout, select=select)
    )  # fmt: skip
    order = sorted({*texts}, key=sha)
    assert [*test, *chosen] == order[: len(test) + len(chosen)]
    assert sorted(trained) == sorted(t for t in texts if t not in {*test, *chosen})
    if not holdout:
        assert not test + chosen
        return
    fifth = count // 5
    below = sum(sha(t) < holdout * 2**256 for t in order)
    assert len(test) == max(below, min(30, max(fifth, 1), count))
    between = sum(sha(t) < (holdout + select) * 2**256 for t in order) - len(test)
    least = min(30, max(fifth, int(count >= 3))) if select else 0
    assert len(chosen) == max(between, min(least, count - len(test)), 0)


@pytest.mark.parametrize(("count", "least"), [(5000, 200), (590, 30), (150, 30), (149, 29), (40, 8), (5, 1), (3, 1)])
def test_there_are_thirty_a_side_where_that_is_no_more_than_a_fifth(tmp_path: Path, count: int, least: int) -> None:
    trained, test, chosen = parts(domain(tmp_path, [f"document {n}" for n in range(count)]))
    assert min(len(test), len(chosen)) >= least
    assert len(trained) >= 0.6 * count or count < 5
    assert len(trained) + len(test) + len(chosen) == count
    if count == 5000:
        assert abs(len(test) - 250) < 50
        assert abs(len(chosen) - 250) < 50


def test_the_order_of_files_and_of_documents_does_not_matter(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(300)]
    files = [tmp_path / f"{n}.jsonl" for n in range(3)]
    found = []
    for seed in range(2):
        random.Random(seed).shuffle(texts)
        for n, file in enumerate(files):
            write_jsonl(file, [{"text": t} for t in texts[n::3]])
        found.append(parts(Split([str(f) for f in files[:: 1 - 2 * seed]], [], DataSettings()))[1:])
    assert found[0] == found[1]
    sources = {text: n for n, file in enumerate(files) for text in file.read_text().split('"')}
    assert {sources[t] for t in found[0][0]} == {0, 1, 2}


def test_a_document_that_is_held_out_stays_so_when_others_join(tmp_path: Path) -> None:
    texts = [f"document {n}" for n in range(4000)]
    few, many = (parts(domain(tmp_path, texts[:n])) for n in (2000, 4000))
    assert {*few[1]} <= {*many[1]}
    assert {*few[2]} <= {*many[2]}


def test_only_the_smallest_hashes_are_stored_but_none_of_the_rest_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document {n}" for n in range(500)]
    _, every, chosen = parts(domain(tmp_path, texts, holdout=0.3))
    monkeypatch.setattr(splitting, "KEPT", 20)
    trained, test, _ = parts(domain(tmp_path, texts, holdout=0.3))
    assert test == every[:20]
    assert len(every) > 100
    assert {*trained} == {*texts} - {*every} - {*chosen}


def test_conversations_that_differ_in_their_calls_alone_are_not_the_same(tmp_path: Path) -> None:
    def talk(n: int) -> dict[str, Any]:
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": n}}}],
        }
        return {"id": n, "messages": [{"role": "user", "content": "Go on."}, call]}

    write_jsonl(tmp_path / "x.jsonl", [*map(talk, range(40)), {**talk(7), "id": 99, "tools": []}])
    split = Split([str(tmp_path / "x.jsonl")], [], DataSettings(holdout=0.2))
    trained = [d.messages[1]["tool_calls"][0]["function"]["arguments"]["a"] for d in split.train()]
    held = [h.document.messages[1]["tool_calls"][0]["function"]["arguments"]["a"] for h in (*split.test, *split.select)]
    assert sorted({*trained, *held}) == [*range(40)]
    assert not {*trained} & {*held}
    assert len(held) == len({*held})


# ---- source documents that come in pieces ----


def books(folder: Path, count: int, length: int = 40_000) -> list[str]:
    """Plain texts of two or three pieces each."""
    folder.mkdir(exist_ok=True)
    for n in range(count):
        words = random.Random(n)
        text = " ".join(words.choice(("sun", "moon", "star", f"book{n}", str(words.random()))) for _ in range(length))
        (folder / f"{n:03}.txt").write_text(text[:length])
    return sorted(str(f) for f in folder.iterdir())


def test_a_plain_text_is_held_out_whole_with_all_its_pieces(tmp_path: Path) -> None:
    files = books(tmp_path / "b", 60)
    split = Split(files, [], DataSettings())
    trained, test, chosen = parts(split)
    whole = {file: Path(file).read_text() for file in files}
    order = sorted(files, key=lambda f: sha(whole[f]))
    assert not split.warnings

    def owners(texts: list[str]) -> set[str]:
        return {f for f in files if any(t in whole[f] for t in texts)}

    assert owners(test) == {*order[: len(owners(test))]}
    assert owners(chosen) == {*order[len(owners(test)) : len(owners(test)) + len(owners(chosen))]}
    assert min(len(owners(test)), len(owners(chosen))) >= 12
    assert not owners(trained) & (owners(test) | owners(chosen))
    assert len({h.source for h in split.test}) == len(owners(test)) < len(test)
    assert "".join(trained) == "".join(whole[f] for f in files if f in owners(trained))


def test_the_first_documents_of_a_side_are_of_different_sources(tmp_path: Path) -> None:
    split = Split(books(tmp_path / "b", 60), [], DataSettings())
    for _ in split.train():
        pass
    sources = [h.source for h in split.test]
    assert len({*sources[: len({*sources})]}) == len({*sources})


@pytest.mark.parametrize("held", [False, True])
def test_the_order_of_held_out_texts_is_the_same_wherever_their_files_lie(tmp_path: Path, held: bool) -> None:
    """The key of the tokens step depends on the files' contents, not their paths."""
    found = []
    for place in ("a", "another"):
        files = books(tmp_path / place, 60, 18_000)
        split = Split(files[:30] if held else files, files[30:] if held else [], DataSettings())
        found.append((*parts(split), [h.source for h in split.test]))
    assert found[0] == found[1]
    assert len({*found[0][3]}) > 5


def test_a_single_text_is_split_by_pieces_and_that_is_said(tmp_path: Path) -> None:
    split = Split(books(tmp_path / "b", 1, length=1_000_000), [], DataSettings())
    trained, test, chosen = parts(split)
    assert min(len(test), len(chosen)) >= 12
    assert len(trained) > len(test) + len(chosen)
    assert "1 source documents are too few" in split.warnings[0]
    assert len({h.source for h in split.test}) == len(test)


def test_a_piece_of_a_held_out_text_is_not_trained_on_where_it_stands_as_a_record(tmp_path: Path) -> None:
    files = books(tmp_path / "b", 60)
    openings = [next(d.text for d in read([f], skip_bad=False, counts=Counts())) for f in files]
    write_jsonl(tmp_path / "copies.jsonl", [{"text": t} for t in openings])
    trained, test, chosen = parts(Split([*files, str(tmp_path / "copies.jsonl")], [], DataSettings()))
    held = {*test, *chosen}
    assert not held & {t[:4096] for t in trained}
    assert len(held & {t[:4096] for t in openings}) > 20
    assert len({t[:4096] for t in openings} - held) > 10


# ---- held-out files ----


@pytest.mark.parametrize("count", [1, 2, 3, 41, 400])
def test_held_out_files_are_dealt_to_both_sides_and_trained_on_nowhere(tmp_path: Path, count: int) -> None:
    texts = [f"held {n}" for n in range(count)]
    write_jsonl(tmp_path / "data.jsonl", [{"text": t} for t in (*texts[::2], "a", "b", "a")])
    write_jsonl(tmp_path / "valid.jsonl", [{"text": t} for t in (*texts, texts[0])])
    files = [str(tmp_path / "data.jsonl")], [str(tmp_path / "valid.jsonl")]
    split = Split(*files, DataSettings())
    trained, test, chosen = parts(split)
    assert trained == ["a", "b", "a"]
    assert split.left_out == len(texts[::2])
    assert [*test, *chosen] == sorted(texts, key=sha)
    assert abs(len(test) - count / 2) <= (1 if count < 100 else 40)
    assert len(test) >= 1
    assert parts(Split(*files, DataSettings(select=0)))[1:] == (sorted(texts, key=sha), [])


def test_a_single_held_out_text_is_dealt_by_pieces_with_a_warning(tmp_path: Path) -> None:
    valid = books(tmp_path / "v", 1, length=300_000)
    write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    split = Split([str(tmp_path / "data.jsonl")], valid, DataSettings())
    _, test, chosen = parts(split)
    assert len(test) - len(chosen) in (0, 1)
    assert split.warnings


# ---- other domains ----


def test_what_another_domain_holds_out_is_not_trained_on_here(tmp_path: Path) -> None:
    rows = [{"text": f"document {n}"} for n in range(200)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    write_jsonl(tmp_path / "more.jsonl", [{"text": f"another {n}"} for n in range(2000)])
    write_jsonl(tmp_path / "theirs.jsonl", rows[:7])
    write_jsonl(tmp_path / "own.jsonl", rows[7:9])
    data, more, theirs, own = (str(tmp_path / f"{n}.jsonl") for n in ("data", "more", "theirs", "own"))
    by_file = Split([data], [own], DataSettings(), apart=[theirs])
    assert parts(by_file)[0] == [r["text"] for r in rows[9:]]
    assert by_file.left_out == 9
    there_trained, *held = parts(Split([data], [], DataSettings()))
    assert sum(map(len, held)) == 60
    for here in (
        Split([data, more], [], DataSettings(), beside=[[data]]),  # on its own it would hold out fewer of these
        Split([data, more], [own], DataSettings(), beside=[[data]]),
    ):
        trained = parts(here)[0]
        assert not {*trained} & {*held[0], *held[1]}
        assert {*there_trained} & {*trained}
    unaware = parts(Split([data, more], [], DataSettings()))[0]
    assert {*unaware} & {*held[0], *held[1]}


def test_the_graph_tells_each_domain_what_those_that_share_its_files_hold_out(world: World) -> None:
    from btx.cli.main import graph_of
    from btx.steps.tokens import TokensStep

    world.set("domains.both", {"data": ["data"], "tokens": 64})
    world.set("seed.data", ["data/math.jsonl"])
    steps = graph_of(world.write(), ()).steps
    splits = {n: s.split() for n, s in steps.items() if isinstance(s, TokensStep)}
    trained = {name: {*parts(split)[0]} for name, split in splits.items()}
    for name, split in splits.items():
        if name != "tokens:seed":  # whose held-out documents are scored nowhere
            held = {h.document.text for h in (*split.test, *split.select)}
            assert held
            assert not any(held & texts for texts in trained.values())


def test_a_share_that_leaves_nothing_and_a_side_that_is_empty_are_refused() -> None:
    with pytest.raises(ValueError, match=r"holdout \(0.6\) and select \(0.5\) leave nothing"):
        DataSettings(holdout=0.6, select=0.5)
    raw = {"name": "x", "seed": {"checkpoint": "s"}, "domains": {"a": {"data": ["a"], "tokens": 1}}}
    with pytest.raises(ValueError, match=r"evaluate.split is select, and data.select holds nothing out"):
        Recipe.model_validate({**raw, "data": {"select": 0}, "evaluate": {"split": "select"},
                               "merge": {"include_seed": True}})  # fmt: skip
