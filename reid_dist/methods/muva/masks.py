"""Part masks of training images: a side table keyed by image digest, read whole and joined to a view.

    <root>/tables/<name>.side.lance   digest, visible (bits of [3, L] row-major), boxes (JSON), fallback (parts)

Stored is visibility (bits), not the original's additive form: 48 bytes an image, and no convention about -inf to
guess. The rows are always head, upper body, legs; a recipe may use some of them. Keys are image digests, so one table
serves every packing of the same images, and file names cannot collide across datasets (methods/muva.md sections 5.4
and 8, trap 12).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from reid_dist.config import DataConfig
from reid_dist.errors import UserError
from reid_dist.methods.muva.boxes import boxes_to_patches
from reid_dist.methods.muva.config import PARTS

if TYPE_CHECKING:
    from reid_dist.data.side import SideTable

logger = logging.getLogger(__name__)
BANDS_EVERYWHERE = "bands"  # instead of a side table: the fixed bands of boxes.py for every image, no grounding


class ImageRows(Protocol):
    """What masks need of a TableView."""

    def __len__(self) -> int: ...

    def digests(self, rows: np.ndarray) -> list[str]: ...

    def path(self, row: int) -> str: ...


@dataclass(frozen=True, slots=True)
class MaskRow:
    """One image's masks and where they come from."""

    digest: str  # hex SHA-256 of the encoded image
    visible: np.ndarray  # bool [3, L]
    boxes: Mapping[str, Sequence[Sequence[float]]] | None = None  # as the grounding model gave them, in fractions
    fallback: Sequence[str] = ()  # parts whose mask is the fixed band


def write_masks(root: str, name: str, rows: Iterable[MaskRow], grid: tuple[int, int], source: str) -> int:
    """Publish masks as the next version of side table `name`; returns the version. `source`: model, file or rule.

    Raises UserError for no rows, a mask that is not [3, rows x columns], or two masks of one image that differ.
    """
    import pyarrow as pa

    from reid_dist.data.side import write_side_table

    found: dict[str, MaskRow] = {}
    for row in rows:
        if row.visible.shape != (len(PARTS), grid[0] * grid[1]) or row.visible.dtype != np.bool_:
            raise UserError(
                f"mask of image {row.digest[:12]}: {row.visible.dtype} {row.visible.shape}, expected bool "
                f"({len(PARTS)}, {grid[0] * grid[1]}) for a grid of {grid[0]} x {grid[1]} patches"
            )
        before = found.setdefault(row.digest, row)
        if not np.array_equal(before.visible, row.visible):
            raise UserError(f"two different masks for image {row.digest[:12]}: keep one")
    if not found:
        raise UserError(f"side table {name}: there are no masks to write")
    table = pa.table(
        {
            "digest": pa.array(list(found), pa.string()),
            "visible": pa.array([np.packbits(row.visible).tobytes() for row in found.values()], pa.binary()),
            "boxes": pa.array(
                [json.dumps(row.boxes) if row.boxes is not None else None for row in found.values()], pa.string()
            ),
            "fallback": pa.array([list(row.fallback) for row in found.values()], pa.list_(pa.string())),
        }
    )
    bands = sum(bool(row.fallback) for row in found.values())
    facts = {"kind": "part masks", "parts": list(PARTS), "grid": list(grid), "source": source, "fallbacks": bands}
    logger.info("part masks %s: %d images, %d of them with a fixed band", name, len(found), bands)
    return write_side_table(root, name, table, ["digest"], facts)


class PartMasks:
    """Masks of all rows of a view, in memory as bits."""

    def __init__(self, packed: np.ndarray, grid: tuple[int, int], parts: Sequence[str]) -> None:
        """`packed` uint8 [N, bytes]: bits of [3, L] of each row. `parts`: those wanted."""
        self.packed, self.grid = packed, grid
        self.rows = [PARTS.index(part) for part in PARTS if part in set(parts)]

    def visible(self, rows: np.ndarray) -> np.ndarray:
        """bool [n, R, L] of view rows int64 [n], the wanted parts only."""
        patches = self.grid[0] * self.grid[1]
        bits = np.unpackbits(self.packed[rows], axis=1, count=len(PARTS) * patches)
        return bits.reshape(len(rows), len(PARTS), patches).astype(bool)[:, self.rows]


def open_masks(
    data: DataConfig, names: Sequence[str], view: ImageRows, grid: tuple[int, int], parts: Sequence[str]
) -> PartMasks:
    """The masks of every image of `view` from side tables `names` (the first that has an image wins).

    `names` = ("bands",): the same fixed bands for every image.

    Raises UserError: no table named, a table that is none of masks or of another grid, an image without a mask.
    """
    from reid_dist.data.side import open_side_table
    from reid_dist.storage.cache import NodeCache

    if tuple(names) == (BANDS_EVERYWHERE,):
        bands = np.packbits(boxes_to_patches({}, grid).visible)
        return PartMasks(np.broadcast_to(bands, (len(view), len(bands))), grid, parts)
    if not names:
        raise UserError(
            "model.masks is empty: name the side tables with the part masks of the training images, for example "
            "model.masks=[market-1501-masks], take fixed bands for every image (model.masks=[bands]), or train without "
            "parts (model.parts=[])"
        )
    cache = NodeCache(data.cache, data.cache_gb)
    found: dict[str, bytes] = {}
    for name in names:
        table = open_side_table(data.root, name, cache=cache)
        _check_facts(table, grid)
        columns = table.dataset.to_table(columns=["digest", "visible"])
        for digest, bits in zip(columns["digest"].to_pylist(), columns["visible"].to_pylist(), strict=True):
            found.setdefault(digest, bits)
    digests = view.digests(np.arange(len(view)))
    missing = [row for row, digest in enumerate(digests) if digest not in found]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(view)} training images have no part mask in {', '.join(names)}, first "
            f"{view.path(missing[0])}: ground them too, or import their masks (methods/muva/README.md)"
        )
    packed = np.frombuffer(b"".join(found[digest] for digest in digests), dtype=np.uint8)
    return PartMasks(packed.reshape(len(digests), -1), grid, parts)


def _check_facts(table: SideTable, grid: tuple[int, int]) -> None:
    facts: Mapping[str, Any] = table.facts
    if facts.get("kind") != "part masks" or tuple(facts.get("parts", ())) != PARTS:
        raise UserError(f"side table {table.name} holds no part masks of {', '.join(PARTS)}")
    theirs = tuple(facts["grid"])
    if theirs != grid:
        raise UserError(
            f"side table {table.name} has masks of {theirs[0]} x {theirs[1]} patches, the recipe's images have "
            f"{grid[0]} x {grid[1]}: change model.image_size and model.stride, or make masks for this grid"
        )


def flip_patches(visible: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[..., L] -> the same with the grid's columns reversed."""
    return visible.reshape(*visible.shape[:-1], *grid)[..., ::-1].reshape(visible.shape)
