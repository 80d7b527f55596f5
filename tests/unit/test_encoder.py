"""Documents to ids: text stays text, piece boundaries change no token, and tokenizers without BOS or EOS work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from btx.data.documents import parse
from btx.data.encoder import Encoder
from btx.errors import ArtifactError
from tests.support.chat_cases import CHATML, LLAMA3, QWEN3, tokenizer
from tests.support.world import World, refused

# ---- marks that are text ----


@pytest.mark.parametrize("mark", ["<s>", "<|im_end|>", "<|im_start|>", "</s>"])
@pytest.mark.parametrize("template", [None, CHATML, LLAMA3, QWEN3])
@pytest.mark.parametrize("loss_mask", ["all", "completion"])
def test_marks_within_a_text_are_text_and_those_of_the_template_stay(
    mark: str, template: str | None, loss_mask: str
) -> None:
    using = Encoder(tokenizer("</s>", template), loss_mask)
    special = using.tokenizer.convert_tokens_to_ids(mark)
    text = f"two {mark} plus{mark}"
    if template is None:
        records = [{"text": text}, {"prompt": text, "completion": text}]
    else:
        records = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}]
    for record in records:
        clean = {k: v if isinstance(v, str) else [dict(m, content="x") for m in v] for k, v in record.items()}
        clean = {k: "x" if isinstance(v, str) else v for k, v in clean.items()}
        ids, learn = next(using.encode([parse(record)]))
        assert ids.count(special) == next(using.encode([parse(clean)]))[0].count(special)
        assert using.tokenizer.decode(ids).count(text) == (1 if "text" in record else 2)
        if loss_mask == "completion" and "text" not in record:
            learned = using.tokenizer.decode([i for i, yes in zip(ids, learn, strict=True) if yes])
            assert learned.count(text) == 1
        held = using.scored([parse(record)], 10**6)[0][0][1:]
        assert held.count(special) <= ids.count(special)
        assert text in using.tokenizer.decode(held)


@pytest.mark.parametrize("record", [{"text": "two </s> plus</s>"}, {"prompt": "two", "completion": " </s> plus"}])
@pytest.mark.parametrize("loss_mask", ["all", "completion"])
def test_so_they_are_where_the_vocabulary_has_marks_among_its_words(record: dict[str, str], loss_mask: str) -> None:
    """As in Unigram models converted from sentencepiece."""
    words = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁<>/supltow")]
    fast = Tokenizer(models.Unigram(words, unk_id=0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>")
    assert 1 in made("</s>", split_special_tokens=True)["input_ids"]
    using = Encoder(made, loss_mask)
    ids, learn = next(using.encode([parse(record)]))
    assert (ids.count(1), len(ids)) == (1, len(learn))
    assert "".join(made.convert_ids_to_tokens(ids[:-1])).replace("▁", " ").lstrip() == "".join(record.values())
    assert 1 not in using.scored([parse(record)], 100)[0][0][1:]
    assert list(using.encode([parse({"text": "<unk>"})]))


@pytest.mark.parametrize("stated", [True, False])
def test_the_mark_that_the_tokenizer_puts_in_front_stands_there_whatever_it_is_called(stated: bool) -> None:
    made = marked(tokenizer(bos="<s>" if stated else None), "<s> $A")
    ids = next(Encoder(made, "all").encode([parse({"text": "two plus"})]))[0]
    assert ids == [*made("two plus")["input_ids"], made.eos_token_id]
    assert Encoder(made, "all").scored([parse({"text": "two plus"})], 100)[0] == (made("two plus")["input_ids"], 8)


def test_two_marks_in_front_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"2 special tokens before a text \(<pad><s>\)"):
        Encoder(marked(tokenizer(), "<pad> <s> $A"), "all")


def marked(made: Any, single: str) -> Any:
    """A tokenizer with these marks around a text."""
    ids = {mark: made.convert_tokens_to_ids(mark) for mark in single.split() if mark != "$A"}
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=list(ids.items()))
    return made


def test_a_tokenizer_that_draws_at_random_is_refused(world: World) -> None:
    path = world.seed / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["dropout"] = 0.1
    path.write_text(json.dumps(data), encoding="utf-8")
    refused(world.write(), world.runs, 3, ("drops merges at random", "dropout 0.1", "Set it to null"))


# ---- pieces ----


@pytest.mark.parametrize("prepend", ["metaspace", "prepend"])
def test_a_prompt_and_its_completion_are_encoded_as_one_text(prepend: str) -> None:
    from tokenizers import normalizers

    fast = Tokenizer(models.BPE(unk_token="<unk>"))
    if prepend == "metaspace":
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    fast.train_from_iterator(["return (a + b) return(a+b) ▁"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>")
    record = {"prompt": "return", "completion": "(a + b)"}
    all_ids = next(Encoder(made, "all").encode([parse(record)]))[0]
    ids, learn = next(Encoder(made, "completion").encode([parse(record)]))
    assert ids == all_ids == [*made("return(a + b)", add_special_tokens=False)["input_ids"], made.eos_token_id]
    learned = [made.convert_ids_to_tokens(i) for i, yes in zip(ids, learn, strict=True) if yes]
    assert "".join(learned).replace("▁", "").replace(" ", "") == "(a+b)</s>"
    assert learned[-1] == "</s>"


def test_a_token_over_the_seam_is_learned() -> None:
    using = Encoder(tokenizer(), "completion")
    ids, learn = next(using.encode([parse({"prompt": "what is ", "completion": "two"})]))
    learned = using.tokenizer.decode([i for i, yes in zip(ids, learn, strict=True) if yes])
    assert learned.removesuffix("<|im_end|>").endswith("two")


# ---- no mark at all ----


def test_without_start_and_end_mark_bytes_and_nats_are_of_the_same_text_and_documents_stay_apart() -> None:
    using = Encoder(tokenizer(eos=None, bos=None), "all")  # type: ignore[arg-type]
    assert using.start is None is using.end
    texts = ["two", "two plus three", "ä"]
    for text, (ids, size) in zip(texts, using.scored([parse({"text": t}) for t in texts], 4096), strict=True):
        assert using.tokenizer.decode(ids) == text
        if text != "ä":
            assert size == len(using.tokenizer.decode(ids[1:]).encode())
    first, second = (ids for ids, _ in using.encode([parse({"text": t}) for t in texts[:2]]))
    assert using.tokenizer.decode(first + second) == "two<pad>two plus three<pad>"
    using.tokenizer.pad_token = None
    bare = Encoder(using.tokenizer, "all")
    assert bare.tokenizer.decode(next(bare.encode([parse({"text": "two"})]))[0]) == "two\n\n"
    assert "no start and no end token" in bare.warnings[0]
    assert not Encoder(tokenizer(), "all").warnings
