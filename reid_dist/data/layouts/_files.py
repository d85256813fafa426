"""What writers of layouts share: one file at a time, no name twice, images converted without loss."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Folder:
    """The tree being written. Raises ValueError when two samples ask for one name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: list[str] = []  # of the images, in the samples' order
        self._taken: set[str] = set()

    def image(self, name: str, data: bytes) -> str:
        """Write one image; its extension says what format it must have."""
        if name in self._taken:
            raise ValueError(f"two samples are called {name}")
        self._taken.add(name)
        self.paths.append(name)
        return self.file(name, converted(data, name))

    def file(self, name: str, data: bytes) -> str:
        """Write any file."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return name

    def lines(self, name: str, lines: list[str]) -> None:
        """Write a text file."""
        self.file(name, "".join(f"{line}\n" for line in lines).encode())

    def json(self, name: str, content: Any) -> None:
        """Write a JSON file, UTF-8."""
        self.file(name, (json.dumps(content, ensure_ascii=False, indent=0) + "\n").encode())

    def mat(self, name: str, content: dict[str, Any]) -> None:
        """Write a MATLAB file of version 5."""
        from scipy.io import savemat

        buffer = io.BytesIO()
        savemat(buffer, content)
        self.file(name, buffer.getvalue())


def converted(data: bytes, name: str) -> bytes:
    """`data`, as PNG or BMP when the name says so."""
    kind = name.rpartition(".")[2].upper()
    if kind not in ("PNG", "BMP"):
        return data
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.save(buffer, kind)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """uint8 [height, width, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def cells(items: list[Any]) -> np.ndarray:
    """A MATLAB cell row [1, n]."""
    row = np.empty((1, len(items)), dtype=object)
    for i, item in enumerate(items):
        row[0, i] = item
    return row
