"""`btx chat`: talk to any model that btx publishes, a checkpoint or a composed one."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from btx.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from btx.data.encoder import Encoder
    from btx.models.opened import Opened

UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="A system message; needs a chat template that takes one.")
@click.option("--plain", is_flag=True, help="Continue each line as text, without the chat template.")
@click.option("--most", type=click.IntRange(min=1), default=256, show_default=True, help="New tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=0.95, show_default=True,
              help="Share of probability that is sampled from.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def chat(
    model: Path, system: str | None, plain: bool, most: int, temperature: float, top_p: float, seed: int, device: str
) -> None:
    """Talk to MODEL, the folder of an export or of any model of a run, in float32.

    A model with a chat template answers in a conversation; of any other, each line is continued. Ctrl-C ends an
    answer, an empty line ends the chat. Prompts may be piped in, one a line.
    """
    import torch

    from btx.conversions.registry import open_model
    from btx.data.encoder import Encoder, load_tokenizer
    from btx.recipe.settings import RunSettings

    if not model.is_dir():
        raise ArtifactError(f"there is no folder {model}. Name an export, or the folder of any model (`btx path`).")
    tokenizer = load_tokenizer(model)
    plain = plain or not tokenizer.chat_template
    if system and plain:
        raise click.UsageError("--system needs a chat template, and there is none, or --plain leaves it out.")
    encoder = Encoder(tokenizer, "all", date=datetime.datetime.now(datetime.UTC).date().isoformat())
    chosen = {"most": most, "temperature": temperature, "top_p": top_p}
    with open_model(model, where=RunSettings.model_validate({"device": device})) as opened:
        random = torch.Generator(opened.device).manual_seed(seed)
        talk = Talk(opened, encoder, model, plain=plain, system=system, random=random, chosen=chosen)
        if sys.stdin.isatty():
            click.echo("Each line is continued as text." if plain else "An empty line ends the chat.", err=True)
        for line in lines():
            talk.say(line)


def lines() -> Iterator[str]:
    """What the user types, until an empty line or the end; piped lines, empty ones left out."""
    if not sys.stdin.isatty():
        yield from filter(None, (line.rstrip("\n") for line in sys.stdin))
        return
    import readline  # noqa: F401  # gives `input` editing and a history

    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if not line.strip():
            return
        yield line


class Talk:
    """A conversation with an opened model, which prints the answers as they come."""

    def __init__(
        self, model: Opened, encoder: Encoder, folder: Path, *, plain: bool, system: str | None,
        random: torch.Generator, chosen: dict[str, Any],
    ) -> None:  # fmt: skip
        from btx.tasks.solve import end_ids

        self.model, self.encoder, self.plain, self.random, self.chosen = model, encoder, plain, random, chosen
        self.end = end_ids(folder, encoder.tokenizer)
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = [*self.opening]

    def say(self, line: str) -> None:
        """Answer a line."""
        asked = [*self.messages, {"role": "user", "content": line}]
        ids = self.encoder.prompt(line) if self.plain else self.encoder.conversation(asked)
        room = self.model.positions - len(ids) if self.model.positions is not None else self.chosen["most"]
        if not ids:
            click.echo("(The tokenizer makes no token of that.)", err=True)
            return
        if room < 1:
            what = "That" if self.plain else "The conversation"
            anew = "" if self.plain else "; it starts anew"
            click.echo(f"({what} is longer than the model's {self.model.positions} positions{anew}.)", err=True)
            self.messages = [*self.opening]
            return
        text = self.answer(ids, min(room, self.chosen["most"]))
        if not self.plain:
            self.messages = [*asked, {"role": "assistant", "content": text}]

    def answer(self, ids: list[int], most: int) -> str:
        """The answer to a prompt, printed while it is generated, then its speed."""
        import torch

        from btx.models.generation import generate
        from btx.tasks.solve import text_of

        shown, started, count = "", time.perf_counter(), 0

        def show(new: Any) -> bool:
            nonlocal shown, count
            text, count = text_of(self.encoder.tokenizer, new, self.end), len(new)
            if not text.endswith(UNFINISHED):
                click.echo(text[len(shown) :], nl=False)
                shown = text
            return False

        prompt = torch.tensor([ids], device=self.model.device)
        settings = {**self.chosen, "most": most}
        try:
            generate(self.model, prompt, end=self.end, random=self.random, stopped=show, **settings)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        click.echo()
        if sys.stderr.isatty():
            click.secho(f"({count} tokens, {count / (time.perf_counter() - started):.3g} a second)", dim=True, err=True)
        return shown
