"""Packed tokens: they hold the documents, masks and byte counts are right, held-out documents are never trained on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btx.data.heldout import SIDES
from btx.data.packed import Encoder, Tokens, load_tokenizer, survey, train_tokens, write_tokens
from btx.data.split import Split
from btx.errors import ArtifactError, RecipeError
from btx.recipe.settings import DataSettings
from tests.support.models import tokenizer_into
from tests.support.world import write_jsonl

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
CHAT = [
    {"role": "user", "content": "Wie heißt du?"},
    {"role": "assistant", "content": "Ada 🜁"},
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps"},
]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_into(folder)
    return folder


def encoder(folder: Path, loss_mask: str = "all", template: str | None = None) -> Encoder:
    """An encoder with or without a chat template."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return Encoder(tokenizer, loss_mask)


def written(
    out: Path, rows: list[Any], using: Encoder, *, valid: list[Any] | None = None, **more: Any
) -> tuple[Tokens, dict[str, Any]]:
    """The tokens folder of these records, and its facts."""
    out.mkdir(parents=True, exist_ok=True)
    files = {"data": rows, "valid": valid or []}
    for name, records in files.items():
        write_jsonl(out / f"{name}.jsonl", records)
    settings_ = DataSettings(loss_mask=using.loss_mask, **more)
    split = Split([str(out / "data.jsonl")], [str(out / "valid.jsonl")] if valid else [], settings_)
    facts = write_tokens(out, split, settings=settings_, encoder=using)
    return Tokens(out), facts


def documents(ids: Any, using: Encoder) -> list[str]:
    """The texts between the end-of-text tokens."""
    text = using.tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)
    return text.split("<|end|>")[:-1] if text else []


def held(tokens: Tokens, using: Encoder) -> list[str]:
    """The held-out texts of both splits."""
    return [using.tokenizer.decode(list(ids[1:])) for side in SIDES for ids, _ in tokens.valid(10**9, side)]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXT, max_size=8), share=st.sampled_from([0.0, 0.3, 0.9]))
def test_the_training_tokens_are_the_documents_and_no_held_out_one_is_among_them(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, texts: list[str], share: float
) -> None:
    texts = [*texts, *texts[:2]]  # some occur twice
    using = encoder(folder)
    out = tmp_path_factory.mktemp("out")
    tokens, facts = written(out, [{"text": t} for t in texts], using, holdout=share)
    trained = documents(tokens.train, using)
    kept = held(tokens, using)
    said = [t for t in texts if t.strip()]
    assert len({*kept}) == len(kept)
    assert sorted(trained) == sorted(t for t in said if t not in kept)
    assert {*kept} <= {*said}
    assert facts["read"]["documents"] == len(said)
    assert bool(kept) == bool(share and said)
    assert train_tokens(out) == len(tokens.train) == facts["train_tokens"]
    assert [size for side in SIDES for _, size in tokens.valid(10**9, side)] == [len(t.encode()) for t in kept]


def test_the_order_of_documents_stays(tmp_path: Path, folder: Path) -> None:
    using = encoder(folder)
    texts = [f"text {n % 50}" for n in range(2000)]
    trained = documents(written(tmp_path, [{"text": t} for t in texts], using, holdout=0.0)[0].train, using)
    assert trained == texts


def test_documents_that_are_in_the_valid_files_too_are_left_out_of_training_and_counted(
    tmp_path: Path, folder: Path
) -> None:
    using = encoder(folder)
    rows = [{"text": t} for t in ("one", "two", "three", "two")]
    tokens, facts = written(tmp_path, rows, using, valid=[{"text": "two"}, {"text": "four"}])
    assert documents(tokens.train, using) == ["one", "three"]
    assert facts["left_out"] == 2
    assert sorted(held(tokens, using)) == ["four", "two"]


@pytest.mark.parametrize("limit", [4, 5, 6, 7])
def test_a_held_out_document_is_cut_between_characters_and_its_bytes_are_those_of_what_is_left(
    tmp_path: Path, folder: Path, limit: int
) -> None:
    using = encoder(folder)
    tokens, _ = written(tmp_path, [{"text": "x"}], using, valid=[{"text": "ä語🜁x"}], valid_bytes=limit)
    ids, size = tokens.valid(10**9)[0]
    text = using.tokenizer.decode(list(ids[1:]))
    assert "ä語🜁x".startswith(text)
    assert limit - 3 <= size == len(text.encode()) <= limit


def test_only_completions_are_learned_and_the_mask_says_so_token_by_token(tmp_path: Path, folder: Path) -> None:
    using = encoder(folder, "completion")
    rows = [{"prompt": "the fox ", "completion": "jüumps"}, {"text": "the dog"}]
    tokens, _ = written(tmp_path, rows, using, holdout=0.0)
    assert tokens.mask is not None
    assert len(tokens.mask) == len(tokens.train)
    learned = documents(tokens.train[tokens.mask == 1], using)
    assert learned == ["jüumps", "the dog"]
    assert documents(tokens.train, using) == ["the fox jüumps", "the dog"]


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("loss_mask", ["all", "completion"])
def test_conversations_follow_the_template_in_training_and_held_out_alike(
    tmp_path: Path, folder: Path, template: str | None, loss_mask: str
) -> None:
    using = encoder(folder, loss_mask, template)
    other = [{"role": "user", "content": "and now"}]
    tokens, _ = written(tmp_path, [{"messages": CHAT}], using, valid=[{"messages": other}])
    plain = "User: Wie heißt du?\n\nAssistant: Ada 🜁\n\nUser: the fox\n\nAssistant: jumps\n\n"
    chat = "[user]Wie heißt du?\n[assistant]Ada 🜁\n[user]the fox\n[assistant]jumps\n"
    assert documents(tokens.train, using) == [chat if template else plain]
    ids, size = tokens.valid(10**9)[0]
    said = using.tokenizer.decode(list(ids[1:]))
    assert said == ("[user]and now\n" if template else "User: and now\n\n")
    assert size == len(said.encode())
    if loss_mask == "all":
        assert tokens.mask is None
    else:
        learned = documents(tokens.train[tokens.mask == 1], using)[0]
        assert learned == ("Ada 🜁\njumps\n" if template else " Ada 🜁\n\n jumps\n\n")


def test_a_template_that_refuses_or_rewrites_is_told_in_a_sentence(tmp_path: Path, folder: Path) -> None:
    refusing = encoder(folder, "all", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RecipeError, match=r"\(user, assistant, .*roles must alternate"):
        written(tmp_path, [{"messages": CHAT}], refusing)
    rewriting = encoder(folder, "completion", "{{ messages | length }}" + TEMPLATE.replace("content", "content[:2]"))
    with pytest.raises(RecipeError, match=r"data.jsonl:1: .*rewrites .* message 2.*loss_mask: all"):
        written(tmp_path, [{"messages": CHAT}], rewriting)


def test_a_template_that_brings_the_start_of_a_text_does_not_double_it(folder: Path) -> None:
    using = encoder(folder, "all", "<|end|>" + TEMPLATE)
    using.start = using.end
    from btx.data.documents import parse

    ids = next(using.encode([parse({"messages": CHAT})]))[0]
    plain = next(using.encode([parse({"text": "a"})]))[0]
    assert ids[0] == using.end != ids[1]
    assert plain[0] == using.end != plain[1]


def test_ids_beyond_sixteen_bits_are_written_whole(tmp_path: Path, folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    fox = "Ġfox"
    data["model"]["vocab"] = {t: 70_000 if t == fox else i for t, i in data["model"]["vocab"].items()}
    (tmp_path / "t").mkdir()
    for file in folder.iterdir():
        (tmp_path / "t" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(data))
    using = encoder(tmp_path / "t")
    assert using.ids == 70_001
    tokens, _ = written(tmp_path / "o", [{"text": "the fox"}], using, holdout=0.0)
    assert 70_000 in tokens.train.tolist()
    assert documents(tokens.train, using) == ["the fox"]


def test_a_truncation_that_the_tokenizer_was_saved_with_is_not_followed(tmp_path: Path, folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    using = encoder(tmp_path)
    text = "the quick brown fox " * 50
    assert documents(written(tmp_path / "o", [{"text": text}], using, holdout=0.0)[0].train, using) == [text]


@pytest.mark.parametrize("limit", [1, 5, 20, 10**9])
def test_held_out_documents_are_handed_out_until_the_limit_is_reached(tmp_path: Path, folder: Path, limit: int) -> None:
    rows = [{"text": f"the number {n}"} for n in range(5)]
    tokens, facts = written(tmp_path, [{"text": "x"}], encoder(folder), valid=rows)
    sizes = [len(ids) - 1 for ids, _ in tokens.valid(limit)]
    everything = [len(ids) - 1 for ids, _ in tokens.valid(10**9)]
    assert sum(everything) == facts["valid_tokens"]
    assert sizes == everything[: len(sizes)]
    assert sum(sizes) >= min(limit, sum(everything))
    assert sum(sizes[:-1]) < limit


def test_a_folder_without_a_tokenizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer in .* cannot be loaded .*Copy the tokenizer files"):
        load_tokenizer(tmp_path)


def test_surveying_counts_what_is_written(tmp_path: Path, folder: Path) -> None:
    rows = [{"text": f"the number {n} é"} for n in range(30)]
    using = encoder(folder)
    _, facts = written(tmp_path, rows, using)
    counts = [survey(Split([str(tmp_path / "data.jsonl")], [], DataSettings()), using, enough=n, label="x")
              for n in (1, 50, 10**9)]  # fmt: skip
    assert counts[-1] == facts["train_tokens"]
    assert all(a < b for a, b in pairwise(counts))
    assert (
        survey(Split([str(tmp_path / "data.jsonl")], [], DataSettings()), None, enough=10**9, label="x") >= counts[-1]
    )
    assert np.all(np.array(counts) >= [1, 50, 0])
