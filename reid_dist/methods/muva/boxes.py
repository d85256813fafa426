"""From boxes of body parts to masks on the patch grid: pure functions, called by the grounding job and by tests.

The authors' rasterisation and calibration are unpublished; this is the rule that methods/muva.md section 5.4
proposes. Boxes are (left, top, right, bottom) in fractions of the image's width and height.

Shapes: R parts in the order of config.PARTS, L = rows * columns patches, row-major.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reid_dist.methods.muva.config import PARTS

Box = tuple[float, float, float, float]
LARGEST_AREA = 0.95  # of the image; a larger box says nothing
BANDS = {"head": (0, 3), "upper": (3, 9), "legs": (8, 16)}  # of 16 rows: where parts lie when nothing is known


@dataclass(frozen=True, slots=True)
class PartPatches:
    """One image's masks."""

    visible: np.ndarray  # bool [R, L]
    fallback: tuple[str, ...]  # parts that took the fixed band


def usable(box: Sequence[float], grid: tuple[int, int]) -> Box | None:
    """The box clipped to the image; None if not four finite numbers, under one patch, or nearly the whole image."""
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        return None
    left, top, right, bottom = (min(max(float(value), 0.0), 1.0) for value in box)
    area = max(0.0, right - left) * max(0.0, bottom - top)
    if area < 1 / (grid[0] * grid[1]) or area > LARGEST_AREA:
        return None
    return left, top, right, bottom


def rasterise(boxes: Sequence[Box], grid: tuple[int, int]) -> np.ndarray:
    """bool [rows, columns]: patches whose centre lies in a box; a box without any takes the patch at its centre."""
    rows, columns = grid
    y, x = (np.arange(rows) + 0.5)[:, None] / rows, (np.arange(columns) + 0.5)[None, :] / columns
    visible = np.zeros(grid, dtype=bool)
    for left, top, right, bottom in boxes:
        inside = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
        if not inside.any():
            inside[
                min(int((top + bottom) / 2 * rows), rows - 1), min(int((left + right) / 2 * columns), columns - 1)
            ] = True
        visible |= inside
    return visible


def band(part: str, grid: tuple[int, int]) -> np.ndarray:
    """bool [rows, columns]: the fixed rows of a part, scaled to the grid (edges rounded outwards)."""
    rows, columns = grid
    first, last = BANDS[part]
    visible = np.zeros((rows, columns), dtype=bool)
    visible[first * rows // 16 : -(-last * rows // 16)] = True
    return visible


def boxes_to_patches(boxes: Mapping[str, Sequence[Sequence[float]]], grid: tuple[int, int]) -> PartPatches:
    """Boxes by part name -> masks.

    A part without a usable box takes its fixed band; when the head's boxes do not lie above the legs' (centres of their
    hulls), no box is believed and all parts take theirs. Raises ValueError for an unknown part.
    """
    unknown = sorted(set(boxes) - set(PARTS))
    if unknown:
        raise ValueError(f"boxes of unknown parts {unknown}; known: {', '.join(PARTS)}")
    good = {part: [b for box in boxes.get(part, ()) if (b := usable(box, grid)) is not None] for part in PARTS}
    if good["head"] and good["legs"] and _middle(good["head"]) >= _middle(good["legs"]):
        good = {part: [] for part in PARTS}
    masks = [rasterise(good[part], grid) if good[part] else band(part, grid) for part in PARTS]
    return PartPatches(np.stack(masks).reshape(len(PARTS), -1), tuple(part for part in PARTS if not good[part]))


def _middle(boxes: Sequence[Box]) -> float:
    return (min(box[1] for box in boxes) + max(box[3] for box in boxes)) / 2
