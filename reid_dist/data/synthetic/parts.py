"""Exact part masks from the renderer, on MUVA's patch grid (datasets specification 8.2, muva.md 5.4).

Rows are head, upper body, legs; columns are patches, row by row. A patch belongs to a part that covers at least a
quarter of its area; a part that is seen but covers no patch so far gets the one it covers most. Stored as bool
(`True`: the patch belongs to the part); `additive` is the form that attention adds, 0 or minus infinity.
"""

from __future__ import annotations

import numpy as np

from reid_dist.data.synthetic.render import Drawing

GRID = (16, 8)  # 256 x 128 pixels in patches of 16
PARTS: dict[str, tuple[str, ...]] = {"head": ("head",), "upper": ("torso", "arm"), "legs": ("leg", "foot")}
LEAST = 0.25  # share of a patch's area


def part_shares(drawing: Drawing, grid: tuple[int, int] = GRID) -> np.ndarray:
    """float32 [3, rows * columns]: share of each patch that each part covers."""
    names = [name for group in PARTS.values() for name in group]
    areas = drawing.parts(names)
    starts = np.cumsum([0, *(len(group) for group in PARTS.values())])[:-1]
    areas = np.add.reduceat(areas, starts, axis=0)
    rows, columns = _cells(areas.shape[1], grid[0]), _cells(areas.shape[2], grid[1])
    return np.stack([rows @ area @ columns.T for area in areas]).reshape(len(PARTS), -1).astype(np.float32)


def part_mask(drawing: Drawing, grid: tuple[int, int] = GRID) -> np.ndarray:
    """bool [3, rows * columns]: patches of head, upper body, legs; an empty row: not seen at all."""
    shares = part_shares(drawing, grid)
    mask: np.ndarray = shares >= LEAST
    for part in np.flatnonzero(~mask.any(axis=1) & (shares.max(axis=1) > 0)):
        mask[part, shares[part].argmax()] = True
    return mask


def additive(mask: np.ndarray) -> np.ndarray:
    """float32 of the same shape: 0 where a patch belongs to the part, minus infinity elsewhere."""
    return np.where(mask, np.float32(0), np.float32(-np.inf))


def damaged(mask: np.ndarray, rng: np.random.Generator, drop: float = 0.0, noise: float = 0.0) -> np.ndarray:
    """A copy as a grounding model would give it: whole parts missing with probability `drop`, patches flipped with
    `noise`.
    """
    worse = mask ^ (rng.random(mask.shape) < noise)
    worse[rng.random(len(mask)) < drop] = False
    return worse


def _cells(pixels: int, cells: int) -> np.ndarray:
    """float32 [cells, pixels]: share of each cell that each pixel makes up, whatever the two numbers."""
    edges = np.linspace(0, pixels, cells + 1)
    left, right = edges[:-1, None], edges[1:, None]
    place = np.arange(pixels)
    overlap = np.clip(np.minimum(right, place + 1) - np.maximum(left, place), 0, None)
    return (overlap * cells / pixels).astype(np.float32)
