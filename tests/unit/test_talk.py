"""`btx chat`: what is generated, what the model is asked, and what is refused; and nucleus sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from btx.cli.main import main
from btx.data.encoder import Encoder
from btx.models.generation import _sampled
from tests.support.models import config_of, save_model

TEMPLATE = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}\n{% endfor %}" \
    "{% if add_generation_prompt %}<|end|>assistant: {% endif %}"  # fmt: skip


def chat(folder: Path, *said: str, typed: str) -> Result:
    """The verb with prompts piped in."""
    return CliRunner().invoke(main, ["chat", str(folder), "--device", "cpu", *said], input=typed)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pico model."""
    return save_model(tmp_path / "model", config_of("llama"))


def with_template(folder: Path) -> Path:
    """The same model with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def continued(folder: Path, text: str, most: int) -> str:
    """What transformers itself generates after a text, greedily."""
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    found = net.generate(ids, max_new_tokens=most, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(found, skip_special_tokens=True)).rstrip("\ufffd")


def test_without_a_template_each_line_is_continued(model: Path) -> None:
    done = chat(model, "--temperature", "0", "--most", "12", typed="the quick\n\nbrown fox\n")
    assert done.exit_code == 0, done.output
    assert done.stdout == "".join(f"{continued(model, text, 12)}\n" for text in ("the quick", "brown fox"))


def test_a_conversation_is_asked_as_the_template_writes_it_answers_included(model: Path) -> None:
    asked: list[Any] = []
    real = Encoder.conversation

    def spy(self: Encoder, messages: Any) -> Any:
        asked.append([(m["role"], m["content"]) for m in messages])
        return real(self, messages)

    with patch.object(Encoder, "conversation", spy):
        done = chat(
            with_template(model), "--system", "be brief", "--temperature", "0", "--most", "5", typed="one\ntwo\n"
        )
    first = done.stdout.splitlines()[0]
    opening = [("system", "be brief"), ("user", "one")]
    assert asked == [opening, [*opening, ("assistant", first), ("user", "two")]]
    assert first == continued(model, "<|end|>system: be brief\n<|end|>user: one\n<|end|>assistant: ", 5)


def test_a_seed_of_the_sampling_repeats_it(model: Path) -> None:
    one, again, other = (chat(model, "--most", "20", "--seed", n, typed="the\n").stdout for n in ("1", "1", "2"))
    assert one == again != other


def test_a_conversation_longer_than_the_model_starts_anew(model: Path) -> None:
    done = chat(with_template(model), "--most", "4", "--temperature", "0", typed="word " * 200 + "\nthe\n")
    assert "The conversation is longer than the model's 128 positions; it starts anew" in done.stderr
    assert done.stdout == continued(model, "<|end|>user: the\n<|end|>assistant: ", 4) + "\n"


def test_what_cannot_be_is_refused(model: Path) -> None:
    assert "needs a chat template" in chat(model, "--system", "x", typed="").stderr
    missing = chat(model / "nowhere", typed="")
    assert (missing.exit_code, "there is no folder" in missing.stderr) == (3, True)


def test_a_nucleus_is_the_fewest_likeliest_ids_of_that_probability() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    for top_p, kept in ((1e-9, [1]), (0.4, [1]), (0.41, [1, 2]), (0.7, [1, 2]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        random = torch.Generator().manual_seed(0)
        drawn = torch.stack([_sampled(scores, top_p, random) for _ in range(2000)]).flatten()
        shares = torch.bincount(drawn, minlength=4) / 2000
        wanted = torch.zeros(4).scatter(0, torch.tensor(kept), scores.exp()[0, kept])
        assert torch.allclose(shares, wanted / wanted.sum(), atol=0.04)
        assert (shares > 0).nonzero().flatten().tolist() == kept
