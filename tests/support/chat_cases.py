"""Cases for tests of conversations: templates like well-known ones, and a tokenizer with their special tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from btx.data.documents import parse
from btx.data.encoder import Encoder

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<|/head|>", "<pad>"]
THINK = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added, but not special, as in Qwen3

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + "
    "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\n' + (m.content | trim) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% set ns = namespace(last=messages | length - 1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set think = '' %}{% set content = m.content %}"
    "{% if m.reasoning_content is string %}{% set think = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set think = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and think %}{{ '<think>\n' + think + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = CHATML.replace(
    "m.content + '<|im_end|>' + '\n' }}",
    "'' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
CLOSED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "qwen3": QWEN3, "tagged": TAGGED,
             "closed": CLOSED}  # fmt: skip
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two plus three?"},
    {"role": "assistant", "content": "five"},
    {"role": "user", "content": " And five? five "},
    {"role": "assistant", "content": "  five too\n"},
]


def tokenizer(eos: str = "<|im_end|>", template: str | None = None, bos: str | None = "<s>") -> Any:
    """A byte-level tokenizer with special and other added tokens."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  special_tokens=SPECIAL, show_progress=False)  # fmt: skip
    fast.train_from_iterator(["what is two plus three and five? five too be brief " * 3], trainer)
    fast.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK])
    made = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=bos, eos_token=eos, pad_token="<pad>")
    made.chat_template = template
    return made


def encoded(
    record: Any, template: str | None, *, loss_mask: str = "completion", eos: str = "<|im_end|>"
) -> tuple[str, str]:
    """The text of the ids, and of those that are learned."""
    using = Encoder(tokenizer(eos, template), loss_mask)
    ids, learn = next(using.encode([parse(record)]))
    assert len(ids) == len(learn)
    return using.tokenizer.decode(ids), using.tokenizer.decode([i for i, yes in zip(ids, learn, strict=True) if yes])


def render(record: Any, template: str) -> str:
    """The text that transformers renders."""
    more = {k: v for k, v in record.items() if k != "messages"}
    return str(tokenizer(template=template).apply_chat_template(record["messages"], tokenize=False, **more))
