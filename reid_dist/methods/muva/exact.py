"""Exact part masks of a synthetic world as mask rows: from the renderer's own geometry, no grounding model.

A world draws every picture from its options alone, so masks are drawn again for any grid, not stored with the pictures. Keys
are digests of the very bytes that `write_synthetic` stores in layouts of JPEG files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from reid_dist.data.synthetic import World
from reid_dist.data.synthetic.parts import part_mask
from reid_dist.data.synthetic.write import plan_synthetic
from reid_dist.methods.muva.masks import MaskRow


def exact_masks(
    world: World, layout: str, grid: tuple[int, int], splits: Sequence[str] = ("train",)
) -> Iterator[MaskRow]:
    """Masks bool [3, rows * columns] of the images of `splits`, in the order in which the layout writes them."""
    for shot in plan_synthetic(world, layout):
        if shot.split in splits:
            sample, drawing = world.sample(shot)
            yield MaskRow(hashlib.sha256(sample.image).hexdigest(), part_mask(drawing, grid))
