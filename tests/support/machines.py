"""Machines without the resources that are asked for."""

from __future__ import annotations

import resource


def few_bytes(size: int) -> None:
    """Limit the size of files that this process writes, as on a disk that fills up."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
