"""Added tokens of experts: rows aligned by token, averaged over the models that have them; all else is refused."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from btx.checkpoints.names import BY_TOKEN, EMBEDDING, HEAD
from btx.checkpoints.reader import opened
from btx.errors import ArtifactError
from btx.merge.canonical import opened_canonical
from btx.merge.vocabulary import JointVocabulary, Vocabulary, added_tokens, is_extended, write_joint
from btx.merge.write import write_average, write_moe
from btx.recipe.merge_settings import MergeSettings
from tests.support.merges import load
from tests.support.vocabularies import TOKENS, extended, plain
from tests.support.world import edit_json

IDS = torch.arange(40).reshape(2, 20) * 7 % TOKENS


def joined(out: Path, seed: Path, experts: dict[str, Path], *, average: bool = False, **settings: Any) -> Path:
    """Merge experts and the seed in one vocabulary, the way the step does."""
    out.mkdir()
    vocabulary = write_joint(out, seed, experts)
    with ExitStack() as stack:
        models = {n: stack.enter_context(opened_canonical(f)) for n, f in (*experts.items(), ("seed", seed))}
        joint = JointVocabulary(vocabulary, models, models["seed"])
        cut = {n: joint.trimmed(m) for n, m in models.items()}
        if average:
            write_average(out, cut, cut["seed"], MergeSettings(**settings), joint=joint)
        else:
            write_moe(out, cut, cut["seed"], MergeSettings(**settings), 2, joint=joint)
    return out


def tables(folder: Path) -> dict[str, torch.Tensor]:
    """Embedding and head as stored on disk."""
    found = load_file(folder / "model.safetensors")
    return {name: found[name].float() for name in BY_TOKEN if name in found}


def test_rows_are_aligned_by_token_and_averaged_over_those_that_have_it(tmp_path: Path, family: str) -> None:
    seed = plain(tmp_path / "seed", family)
    experts = {
        "a": extended(tmp_path / "a", family, ["<x>", "<y>"], noise=0.1),
        "b": extended(tmp_path / "b", family, ["<z>", "<y>"], noise=0.2),
        "c": plain(tmp_path / "c", family, noise=0.3),
    }
    merged = joined(tmp_path / "moe", seed, experts)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(merged)
    assert tokenizer.convert_tokens_to_ids(["<x>", "<y>", "<z>"]) == [289, 290, 291]
    text = "the dog <z> jumps<y><x>"
    own = PreTrainedTokenizerFast.from_pretrained(seed)
    assert tokenizer("the dog")["input_ids"] == own("the dog")["input_ids"]
    assert tokenizer(text)["input_ids"][-2:] == [290, 289]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert load(merged).config.vocab_size == 292
    for name, made in tables(merged).items():
        a, b, c, base = (tables(folder)[name] for folder in (*experts.values(), seed))
        torch.testing.assert_close(made[:289], torch.stack([t[:289] for t in (a, b, c, base)]).mean(0))
        assert torch.equal(made[289], a[289])
        torch.testing.assert_close(made[290], (a[290] + b[290]) / 2)
        assert torch.equal(made[291], b[289])


def test_copies_of_an_extended_model_give_its_logits_on_added_tokens_too(tmp_path: Path, family: str) -> None:
    one = extended(tmp_path / "one", family, ["<x>", "<y>"])
    seed = plain(tmp_path / "seed", family)
    merged = load(joined(tmp_path / "moe", seed, {"a": one, "b": one}))
    dense = load(one)
    torch.testing.assert_close(merged(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=0)
    ids = torch.tensor([[5, 289, 17, 290, 9]])
    torch.testing.assert_close(merged(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)


def test_rows_without_a_token_are_averaged_over_those_that_have_none_for_it(tmp_path: Path) -> None:
    seed = plain(tmp_path / "seed", "llama", rows=310)  # padded: 289 tokens
    experts = {
        "in-the-padding": extended(tmp_path / "a", "llama", ["<x>", "<y>"], noise=0.1, rows=310, before=310),
        "cut": extended(tmp_path / "b", "llama", ["<x>"], noise=0.2, rows=290),
        "as-it-was": plain(tmp_path / "c", "llama", noise=0.3, rows=310),
    }
    assert is_extended(seed, experts["cut"])
    assert not is_extended(seed, experts["as-it-was"])
    made = tables(joined(tmp_path / "moe", seed, experts))[EMBEDDING]
    a, b, c, base = (tables(folder)[EMBEDDING] for folder in (*experts.values(), seed))
    assert made.shape == (310, 32)
    torch.testing.assert_close(made[289], (a[289] + b[289]) / 2)
    assert torch.equal(made[290], a[290])
    torch.testing.assert_close(made[291:], torch.stack([t[291:] for t in (a, c, base)]).mean(0))


def test_a_row_that_holds_a_token_elsewhere_is_no_row_without_one(tmp_path: Path) -> None:
    folders = {n: plain(tmp_path / n, "llama", noise=0.1 * i, rows=310) for i, n in enumerate(("seed", "a"))}
    vocabulary = Vocabulary(TOKENS, {"<x>": TOKENS}, {"a": {"<x>": 305}})
    with opened(folders["seed"]) as seed, opened(folders["a"]) as a:
        rows = list(JointVocabulary(vocabulary, {"a": a, "seed": seed}, seed).rows(EMBEDDING, MergeSettings().shared))
    mine, theirs = (tables(folder)[EMBEDDING] for folder in folders.values())
    assert torch.equal(rows[0], theirs[305])
    assert torch.equal(rows[305 - TOKENS], mine[305])
    torch.testing.assert_close(rows[306 - TOKENS], (mine[306] + theirs[306]) / 2)


def test_an_embedding_cut_to_its_tokens_is_an_extension_by_nothing(tmp_path: Path) -> None:
    seed = plain(tmp_path / "seed", "llama", rows=310)
    cut = plain(tmp_path / "cut", "llama", noise=0.1)
    assert is_extended(seed, cut)
    made = tables(joined(tmp_path / "moe", seed, {"cut": cut}))[HEAD]
    assert torch.equal(made[289:], tables(seed)[HEAD][289:])


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "model_stock"])
def test_every_method_leaves_the_seeds_tokens_to_itself_and_weighs_the_others(tmp_path: Path, method: str) -> None:
    seed = plain(tmp_path / "seed", "llama")
    experts = {
        "a": extended(tmp_path / "a", "llama", ["<x>"], noise=0.1),
        "b": extended(tmp_path / "b", "llama", ["<x>", "<y>"], noise=0.2),
    }
    shared: dict[str, Any] = {"method": method} | ({"weights": {"a": 3.0}} if method == "linear" else {})
    made = tables(joined(tmp_path / "all", seed, experts, average=True, shared=shared))[EMBEDDING]
    same = {n: plain(tmp_path / f"plain-{n}", "llama", noise=0.1 + 0.1 * i)
             for i, n in enumerate(experts)}  # fmt: skip
    (tmp_path / "cut").mkdir()
    with ExitStack() as stack:
        models = {n: stack.enter_context(opened_canonical(f)) for n, f in (*same.items(), ("seed", seed))}
        write_average(tmp_path / "cut", models, models["seed"], MergeSettings(shared=shared))
    assert torch.equal(made[:289], tables(tmp_path / "cut")[EMBEDDING])
    a, b = (tables(folder)[EMBEDDING] for folder in experts.values())
    weight = 3.0 if method == "linear" else 1.0
    torch.testing.assert_close(made[289], (weight * a[289] + b[289]) / (weight + 1))
    assert torch.equal(made[290], b[290])


def test_the_seeds_files_are_kept_but_for_the_added_tokens(tmp_path: Path) -> None:
    seed = plain(tmp_path / "seed", "llama")
    joined(tmp_path / "moe", seed, {"a": extended(tmp_path / "a", "llama", ["<x>"])})
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (seed, tmp_path / "moe"))
    assert [t["content"] for t in after["added_tokens"]] == ["<|end|>", "<x>"]
    assert {**after, "added_tokens": 0} == {**before, "added_tokens": 0}


def renamed(data: Any) -> None:
    data["added_tokens"][0]["content"] = "<|other|>"


def merges(data: Any) -> None:
    data["model"]["merges"].pop()


def overlaid(data: Any) -> None:
    data["added_tokens"].append({**data["added_tokens"][0], "content": "<x>", "id": 17})


def twice(data: Any) -> None:
    data["added_tokens"] += [{**data["added_tokens"][0], "content": "<x>", "id": i} for i in (289, 290)]


def dropped(data: Any) -> None:
    data["added_tokens"] = [{**data["added_tokens"][0], "content": "<x>", "id": 289}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, r"id 0 is '<\|end\|>' there and '<\|other\|>' here"),
        (merges, "its vocabulary, merges or options differ"),
        (overlaid, "it adds '<x>' as id 17, one of the seed's"),
        (twice, "added twice"),
        (dropped, r"id 0 is '<\|end\|>' there and missing"),
    ],
)
def test_any_other_change_of_a_tokenizer_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    seed, other = (plain(tmp_path / name, "llama") for name in ("seed", "other"))
    data = json.loads((other / "tokenizer.json").read_text())
    change(data)
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=f"the expert has another tokenizer.*{words}.*Only tokens added"):
        added_tokens(seed, other, "the expert")
    assert not is_extended(seed, other)


def test_tokenizers_that_cannot_be_looked_into_are_refused(tmp_path: Path) -> None:
    seed, other = (plain(tmp_path / name, "llama") for name in ("seed", "other"))
    model = json.loads((other / "tokenizer.json").read_text())["model"]
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.model").write_bytes(b"?")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        added_tokens(seed, other, "the expert")
    (other / "tokenizer.model").unlink()
    (other / "vocab.json").write_text(json.dumps(model["vocab"]))
    (other / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    edit_json(other / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")  # which has a normalizer of its own
    with pytest.raises(ArtifactError, match=r"without tokenizer\.json"):
        added_tokens(seed, other, "the expert")
