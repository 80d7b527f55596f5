"""Error handling of the command: a user's error is printed as one sentence and sets the exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from btx.errors import BtxError, ResourceError, full_disks_told
from btx.signals import interruptible


class Command(click.Group):
    """Prints a BtxError as one sentence, without a traceback, and exits with its code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command; a full disk while printing help is reported as a sentence too."""
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
                sys.stdout.flush()  # flushed here, where a full disk is still reported as a sentence
                return found
        except BtxError as error:
            click.echo(f"btx: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("btx: interrupted; run the same command again to resume.", err=True)
            ctx.exit(os.EX_TEMPFAIL)
        except BrokenPipeError:
            os._exit(1)
        finally:
            _drop_what_cannot_be_written()


def _drop_what_cannot_be_written() -> None:
    """Drop output that cannot be written: Python would flush it again at exit and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
