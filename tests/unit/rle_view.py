"""A visible-infrared view in memory for RLE's tests: identities are patterns, infrared images their grey negatives."""

from __future__ import annotations

import numpy as np


class PairView:
    """What RLE asks of a TableView. Identity i: `visible` + i % 2 visible and `infrared` infrared images."""

    def __init__(
        self, identities: int = 5, visible: int = 3, infrared: int = 3, size: tuple[int, int] = (48, 24)
    ) -> None:
        self.identities, self.size = identities, size
        rows = [
            (pid, modality, number)
            for pid in range(identities)
            for modality, count in (("rgb", visible + pid % 2), ("ir", infrared))
            for number in range(count)
        ]
        self.pid = np.array([10 * pid for pid, _, _ in rows], dtype=np.int64)
        self.modality = np.array([modality for _, modality, _ in rows])
        self.camid = np.array([3 if modality == "ir" else 1 for _, modality, _ in rows], dtype=np.int64)
        self.number = np.array([number for _, _, number in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.pid)

    @property
    def label(self) -> np.ndarray:
        return np.unique(self.pid, return_inverse=True)[1].astype(np.int64)

    def path(self, row: int) -> str:
        return f"cam{self.camid[row]}/{self.pid[row]:04d}/{self.number[row]:04d}.jpg"

    def describe(self) -> str:
        return "pairs"

    def select(self, rows: np.ndarray) -> PairView:
        """The view of some rows."""
        part = PairView.__new__(PairView)
        part.identities, part.size = self.identities, self.size
        part.pid, part.modality, part.camid = self.pid[rows], self.modality[rows], self.camid[rows]
        part.number = self.number[rows]
        return part

    def images(self, rows: np.ndarray) -> list[np.ndarray]:
        """uint8 [h, w, 3]."""
        return [self._image(int(row)) for row in rows]

    def _image(self, row: int) -> np.ndarray:
        base = np.random.default_rng(int(self.pid[row])).integers(0, 200, (6, 3, 3))
        noise = np.random.default_rng(1000 + row).integers(0, 55, (*self.size, 3))
        image = np.kron(base, np.ones((self.size[0] // 6, self.size[1] // 3, 1))) + noise
        if self.modality[row] == "ir":
            image = np.broadcast_to(255 - image.mean(axis=2, keepdims=True), image.shape)
        return image.astype(np.uint8)
