"""Local folders that do not outlive their process for long, however it ends.

A process that is killed (-9) cannot clean up. So each folder is locked by its owner, the system lets go of the lock when the
owner dies, and whoever makes the next folder of the kind removes those that nobody holds. Locks, unlike process ids, also tell
apart containers that share a folder for temporary files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

LOCK, FILES = "lock", "files"


class Scratch:
    """A folder `path` for the files of this process, below the system's folder for temporary files; `close` removes it."""

    def __init__(self, kind: str) -> None:
        remove_abandoned(kind)
        self._folder = Path(tempfile.mkdtemp(prefix=f"reid-{kind}-"))
        self._lock = os.open(self._folder / "new", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(self._folder / "new", self._folder / LOCK)  # nobody sees it unlocked while its owner lives
        self.path = self._folder / FILES
        self.path.mkdir()

    def close(self) -> None:
        """Remove the folder; a second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


def remove_abandoned(kind: str) -> int:
    """Remove the folders of a kind whose owners are dead; returns how many there were."""
    found = 0
    for lock in Path(tempfile.gettempdir()).glob(f"reid-{kind}-*/{LOCK}"):
        try:
            descriptor = os.open(lock, os.O_WRONLY)
        except OSError:  # another user's, or just removed
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
            found += 1
        except BlockingIOError:  # its owner lives
            pass
        finally:
            os.close(descriptor)
    return found
