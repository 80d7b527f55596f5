"""How the command ends: an error that is the user's to mend as one sentence, with its exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from btx.errors import BtxError, ResourceError, full_disks_told
from btx.signals import interruptible


class Command(click.Group):
    """Prints an error that is the user's to mend as one sentence and ends with its exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command; what a full disk does to a verb's help ends in a sentence too."""
        try:
            with full_disks_told():
                return super().main(*args, **kwargs)
        except ResourceError as error:
            click.echo(f"btx: {error}", err=True)
            _drop_what_cannot_be_written()
            sys.exit(error.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            with interruptible(), full_disks_told():
                found = super().invoke(ctx)
                sys.stdout.flush()  # here, where a full disk is still told in a sentence
                return found
        except BtxError as error:
            click.echo(f"btx: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("btx: interrupted; the same command goes on from what is finished.", err=True)
            ctx.exit(os.EX_TEMPFAIL)
        except BrokenPipeError:
            os._exit(1)
        finally:
            _drop_what_cannot_be_written()


def _drop_what_cannot_be_written() -> None:
    """Leave nothing in the buffer that Python would fail to write once more as it ends, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
