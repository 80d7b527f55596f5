"""Machines that have not what is asked of them."""

from __future__ import annotations

import resource


def few_bytes(size: int) -> None:
    """Files of this process grow no longer than this, as on a disk that fills up."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
