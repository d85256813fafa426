"""What the tree fixtures of the larger layouts share: a case with every field of its records, files from arrays."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.fixtures_trees import TRAP, jpeg, png

Row = tuple[Any, ...]  # path, split, pid, camid[, modality, tracklet, frame, trials]
DEFAULTS: Row = ("", "", 0, None, "rgb", None, None, ())


@dataclass(frozen=True)
class SetCase:
    """One tree: its files, and either the records or the words of the error."""

    name: str
    layout: str
    files: dict[str, bytes]
    rows: tuple[Row, ...] = ()
    error: tuple[str, ...] = ()  # all of these stand in the error
    options: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def full_rows(self) -> tuple[Row, ...]:
        """Rows with the fields that were left out."""
        return tuple(row + DEFAULTS[len(row) :] for row in self.rows)

    def write(self, tmp: Path) -> Path:
        """Write below the trap folder and return the root."""
        root = tmp / TRAP / self.layout
        for path, data in self.files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root


def nasty(good: SetCase, name: str, changes: dict[str, bytes | None], *error: str, **options: Any) -> SetCase:
    """`good` with files replaced, added or (None) removed, and what the error must say."""
    files = {path: data for path, data in (good.files | changes).items() if data is not None}
    return SetCase(f"{good.layout}-{name}", good.layout, files, error=error, options=options)


def images(*paths: str) -> dict[str, bytes]:
    """A small image for every path, all different; PNG where the name says so."""
    return {path: png() if path.endswith(".png") else jpeg(i) for i, path in enumerate(paths)}


def mat(**content: Any) -> bytes:
    """A MATLAB 5 file."""
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, content)
    return buffer.getvalue()


def hdf5(write: Any) -> bytes:
    """A MATLAB 7.3 file that `write(file)` fills."""
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        write(file)
    return buffer.getvalue()


def cell(*items: Any) -> np.ndarray:
    """A MATLAB cell row."""
    row = np.empty((1, len(items)), dtype=object)
    for i, item in enumerate(items):
        row[0, i] = item
    return row
