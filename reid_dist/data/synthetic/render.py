"""From outlines to pixels: one map of shape numbers, then a shading of it.

The map (which outline is in front at each fine pixel) is drawn once; colours, visible attributes and, by the same
way, part masks or heat are look-ups in it. Edges are smoothed by drawing at `FINE` times the image's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from reid_dist.data.synthetic import palette
from reid_dist.data.synthetic.body import Shape, View
from reid_dist.data.synthetic.camera import Camera
from reid_dist.data.synthetic.figure import figure
from reid_dist.data.synthetic.identity import ATTRIBUTES, Identity

FINE = 2  # fine pixels per pixel and axis
LEGIBLE = 6.0  # an attribute counts as visible from this many pixels of a 64 x 32 image on
_OCCLUDER = np.zeros((4, 2))


@dataclass(frozen=True, slots=True)
class Drawing:
    """Geometry of one image before any shading."""

    shapes: tuple[Shape, ...]
    front: np.ndarray  # uint8 [H * FINE, W * FINE]: 0 background, else 1 + number of the outline in front

    def parts(self, names: Sequence[str]) -> np.ndarray:
        """float32 [len(names), H, W]: share of each pixel that belongs to a body part (head torso arm leg foot bag)."""
        number = {name: i for i, name in enumerate(names)}
        table = np.full((len(self.shapes) + 1,), len(names), np.uint8)
        for i, shape in enumerate(self.shapes):
            table[i + 1] = number.get(shape.part, len(names))
        of_part = table[self.front]
        return np.stack([_reduce((of_part == i).astype(np.float32)[..., None])[..., 0] for i in range(len(names))])

    def cue_pixels(self) -> dict[str, float]:
        """Per attribute, how many pixels in front show it, counted in pixels of a 64 x 32 image."""
        pixels = np.bincount(self.front.ravel(), minlength=len(self.shapes) + 1)[1:]
        seen = dict.fromkeys(ATTRIBUTES, 0)
        for shape, count in zip(self.shapes, pixels, strict=True):
            for cue in shape.cues:
                seen[cue] += int(count)
        return {name: count * 64 * 32 / self.front.size for name, count in seen.items()}

    def visible(self) -> frozenset[str]:
        """Attributes that can be read off this image: enough pixels of an outline that shows them are in front."""
        return frozenset(name for name, count in self.cue_pixels().items() if count >= LEGIBLE)


def draw(person: Identity, view: View, size: tuple[int, int]) -> Drawing:
    """Project and paint the figure for an image of `size` (height, width)."""
    height, width = size[0] * FINE, size[1] * FINE
    shapes = figure(person, view)
    body = view.scale * person.height * height
    origin = np.array([width * (0.5 + view.shift_x), height * (1 - view.foot)])
    points = np.concatenate([shape.outline for shape in shapes]) * (body, -body) + origin
    if view.occluder is not None:
        shapes.append(Shape(_OCCLUDER, "occluder", "occluder", 1.0, 9.0, ()))
        left, top, wide, tall = np.array(view.occluder) * (width, height, width, height)
        box = [(left, top), (left + wide, top), (left + wide, top + tall), (left, top + tall)]
        points = np.concatenate([points, box])
    image = Image.new("L", (width, height))
    pen, start, flat = ImageDraw.Draw(image), 0, points.ravel().tolist()
    for number, shape in enumerate(shapes, start=1):
        end = start + 2 * len(shape.outline)
        pen.polygon(flat[start:end], fill=number)
        start = end
    return Drawing(tuple(shapes), np.asarray(image))


def shade(
    drawing: Drawing, materials: Mapping[str, np.ndarray], background: np.ndarray, light: float = 1.0
) -> np.ndarray:
    """float32 [H, W, C] in [0, 1]: the figure in `materials` ({material: float [C]}) before `background` [H, W, C]."""
    channels = background.shape[-1]
    table = np.zeros((len(drawing.shapes) + 1, channels + 1), np.float32)
    table[1:, channels] = 1
    for i, shape in enumerate(drawing.shapes):
        table[i + 1, :channels] = materials[shape.material] * (shape.shade * light)
    mixed = _reduce(np.minimum(table, 1)[drawing.front])
    return mixed[..., :channels] + (1 - mixed[..., channels:]) * background


def _reduce(fine: np.ndarray) -> np.ndarray:
    """Mean over FINE x FINE blocks, [H * FINE, W * FINE, C] -> [H, W, C]."""
    total = fine[::FINE, ::FINE].copy()
    for row in range(FINE):
        for column in range(FINE):
            if row or column:
                total += fine[row::FINE, column::FINE]
    return total * np.float32(1 / FINE**2)


def photograph(person: Identity, view: View, camera: Camera, place: np.random.Generator,
               rng: np.random.Generator, turn: np.ndarray | None = None) -> tuple[bytes, Drawing]:  # fmt: skip
    """One visible-light picture: JPEG bytes and the geometry behind it. `place` draws where before the camera, `rng`
    noise; `turn` is the domain's, for dyes.
    """
    drawing = draw(person, view, camera.size)
    scene = shade(drawing, palette.rgb(person, turn), camera.background(place), view.light)
    return camera.expose(scene, rng), drawing
