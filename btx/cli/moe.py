"""The verbs of `btx moe`. Heavy imports wait until a verb needs them."""

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
NAMES = click.option("--name", "names", required=True, multiple=True, help="An expert; repeatable.")


@click.group()
def moe() -> None:
    """Add, remove, replace, mask or extract experts of a Mixture of Experts after the merge.

    FOLDER is an export, or any mixture that btx writes. The result is a new folder; FOLDER is not changed.
    """


def _common(verb: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all verbs share."""
    data = click.option(
        "--data", multiple=True, metavar="NAME=PATH", help="Text of a domain to measure on; repeatable."
    )
    tokens = click.option("--tokens", type=click.IntRange(min=64), default=20_000, show_default=True,
                          help="Tokens to read from each domain.")  # fmt: skip
    out = click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write.")
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

    Its router rows are fitted by ridge regression on each router's inputs, from --data NAME=PATH of its own domain and
    of the existing ones. Existing experts and rows stay bit-identical.
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
    """Replace an expert by another dense model of the same seed; its router rows stay."""
    from btx.export.work import replace as do

    with _work(folder, options) as work:
        do(work, name, expert)


@moe.command()
@FOLDER
@NAME
@_common
def extract(folder: Path, name: str, **options: Any) -> None:
    """Write one expert, with the shared tensors, as a dense model."""
    from btx.export.work import extract as do

    with _work(folder, options) as work:
        do(work, name)


@moe.command()
@FOLDER
@NAMES
@_common
def mask(folder: Path, names: tuple[str, ...], **options: Any) -> None:
    """Mask experts: no token is routed to them. Their weights are kept in masked/ until unmask."""
    from btx.export.work import mask as do

    with _work(folder, options) as work:
        do(work, list(names))


@moe.command()
@FOLDER
@_common
def unmask(folder: Path, **options: Any) -> None:
    """Restore the experts in masked/, bit-identical."""
    from btx.export.work import unmask as do

    with _work(folder, options) as work:
        do(work)
