"""Documents to ids: what is text stays text, a seam changes no token, and tokenizers without marks are dealt with."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from btx.data.documents import parse
from btx.data.encoder import Encoder
from tests.chat_cases import CHATML, LLAMA3, QWEN3, tokenizer

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
    assert "no start and no end mark" in bare.warnings[0]
    assert not Encoder(tokenizer(), "all").warnings
