"""What was measured on this machine and is kept for later processes: small JSON files in the user's cache.

A file that cannot be read, or was written by another version, counts as empty. Writers take a lock, read what is there
and rename a new file into place: a reader never sees half of one, and writers at the same time lose nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def path(name: str) -> Path:
    """The file of that name in ``$XDG_CACHE_HOME/sparsekern``, in ``~/.cache`` where that is not set."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sparsekern" / name


def read(file: Path, version: int) -> dict:
    """Its ``choices``."""
    try:
        content = json.loads(file.read_text())
        if content["version"] == version and isinstance(content["choices"], dict):
            return content["choices"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def update(file: Path, version: int, change: Callable[[dict], dict]) -> None:
    """Put what `change` makes of the file's ``choices`` in their place.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(ImportError):  # no fcntl, no lock
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        choices = change(read(file, version))
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as fresh:
            json.dump({"version": version, "choices": choices}, fresh, indent=1)
        os.replace(fresh.name, file)
