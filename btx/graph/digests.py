"""A cache of input files' SHA-256, so that a second run need not read what the first one hashed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from btx.errors import ResourceError
from btx.graph import artifact


class Digests:
    """SHA-256 of input files, cached by path, size, inode, mtime and ctime."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = False
        try:
            self.known: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}

    def __call__(self, file: Path) -> str:
        """The digest of a file."""
        key = "|".join(map(str, (file.resolve(), *artifact.stamp(file))))
        if key not in self.known:
            self.known[key] = artifact.file_digest(file)
            self.changed = True
        return self.known[key]

    def save(self) -> None:
        """Write new digests to the cache file; losing it costs only time."""
        if not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(self.known, indent=0), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            raise ResourceError(
                f"{self.path} cannot be written: {error}. Free space or fix the permissions."
            ) from error
