"""The verbs of `btx moe`. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from btx.export.work import Work

FOLDER = click.argument("folder", type=click.Path(path_type=Path))
EXPERT = click.argument("expert", type=click.Path(path_type=Path))
NAME = click.option("--name", required=True, help="The expert, by name (experts.json) or number.")
NAMES = click.option("--name", "names", required=True, multiple=True, help="An expert; may be given again.")


@click.group()
def moe() -> None:
    """A mixture's life after the merge: experts added, removed, replaced, masked, extracted.

    FOLDER is an export, or any mixture that btx writes. A new folder is written; FOLDER stays as it is.
    """


def _common(verb: Callable[..., None]) -> Callable[..., None]:
    """The options that every verb has."""
    data = click.option(
        "--data", multiple=True, metavar="NAME=PATH", help="Text of a domain to measure on; repeatable."
    )
    tokens = click.option("--tokens", type=click.IntRange(min=64), default=20_000, show_default=True,
                          help="Tokens read of each domain.")  # fmt: skip
    out = click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder that is written.")
    return data(tokens(out(verb)))


@contextmanager
def _work(folder: Path, options: dict[str, Any]) -> Iterator[Work]:
    from btx.export.work import Work, parse_data

    with ExitStack() as stack:
        say = lambda text: click.echo(text, err=True)  # noqa: E731
        yield Work(stack, folder, options["out"], parse_data(options["data"]), options["tokens"], say)


@moe.command()
@FOLDER
@EXPERT
@NAME
@_common
def add(folder: Path, expert: Path, name: str, **options: Any) -> None:
    """Add a dense model of the same seed as an expert.

    Its router rows are found by ridge regression at what each router sees, on --data NAME=PATH of its own domain and of
    the old ones. Old experts and rows keep their bits.
    """
    from btx.export.work import add as do

    with _work(folder, options) as work:
        do(work, name, expert)


@moe.command()
@FOLDER
@NAMES
@_common
def remove(folder: Path, names: tuple[str, ...], **options: Any) -> None:
    """Remove experts and their router rows: the inverse of add."""
    from btx.export.work import remove as do

    with _work(folder, options) as work:
        do(work, list(names))


@moe.command()
@FOLDER
@EXPERT
@NAME
@_common
def replace(folder: Path, expert: Path, name: str, **options: Any) -> None:
    """Put another dense model of the same seed in the place of an expert, whose router rows stay."""
    from btx.export.work import replace as do

    with _work(folder, options) as work:
        do(work, name, expert)


@moe.command()
@FOLDER
@NAME
@_common
def extract(folder: Path, name: str, **options: Any) -> None:
    """Write an expert on the shared tensors as a dense model."""
    from btx.export.work import extract as do

    with _work(folder, options) as work:
        do(work, name)


@moe.command()
@FOLDER
@NAMES
@_common
def mask(folder: Path, names: tuple[str, ...], **options: Any) -> None:
    """Switch experts off: no token visits them. They lie beside the mixture, in masked/, until unmask."""
    from btx.export.work import mask as do

    with _work(folder, options) as work:
        do(work, list(names))


@moe.command()
@FOLDER
@_common
def unmask(folder: Path, **options: Any) -> None:
    """Switch the experts in masked/ on again, with the bits they had."""
    from btx.export.work import unmask as do

    with _work(folder, options) as work:
        do(work)
