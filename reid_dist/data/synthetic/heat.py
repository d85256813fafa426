"""The infrared shading of the same outlines (datasets specification 8.2).

Intensity comes from what a thing is made of and never from its colour, so shape, hair and sleeve length, bags and the
layout of a pattern are shared with the visible picture and hue is not. Warmth drifts slowly over the picture,
backgrounds are inverted, the sensor has noise of its own; one channel.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageFilter

from reid_dist.data.synthetic.body import View
from reid_dist.data.synthetic.camera import Camera
from reid_dist.data.synthetic.identity import Identity
from reid_dist.data.synthetic.render import Drawing, draw, shade

_UPPER: Mapping[str, float] = {"shirt": 0.66, "hoodie": 0.60, "jacket": 0.54, "coat": 0.48}  # by thickness
_LOWER: Mapping[str, float] = {"trousers": 0.56, "skirt": 0.62}
_PRINT = -0.09  # a printed pattern against its cloth: the layout at low contrast
_OTHER: Mapping[str, float] = {
    "skin": 0.86,
    "hair": 0.44,
    "hat": 0.36,  # cold things stand between cloth and background, so that their outlines show before both
    "shoe": 0.34,
    "bag": 0.34,
    "dark": 0.70,
    "occluder": 0.16,
}
_NOISE = 1.3  # of the visible sensor's


def emissivity(person: Identity) -> dict[str, np.ndarray]:
    """{material: float [1]} of one person; no colour attribute enters."""
    upper = _UPPER[person.attributes["upper_type"]]
    table = {**_OTHER, "upper": upper, "print": upper + _PRINT, "inner": 0.58}
    table["lower"] = _LOWER[person.attributes["lower_type"]]
    return {material: np.array([value]) for material, value in table.items()}


def thermal_background(grey: np.ndarray) -> np.ndarray:
    """float32 [height, width, 1], colder than anybody: bright walls [height, width] are dark ones and the other way."""
    return (0.02 + 0.24 * (1 - grey))[..., None]


def photograph_infrared(person: Identity, view: View, camera: Camera, place: np.random.Generator,
                        rng: np.random.Generator) -> tuple[bytes, Drawing]:  # fmt: skip
    """One infrared picture: grey JPEG bytes and the geometry behind it. `place` draws where and how warm, `rng`
    noise.
    """
    drawing = draw(person, view, camera.size)
    scenery = camera.background(place)
    grey = scenery @ np.array([0.299, 0.587, 0.114], np.float32)
    scene = shade(drawing, emissivity(person), thermal_background(grey), 0.9 + 0.1 * view.light)[..., 0]
    scene = scene * (1 + 0.12 * _slow(place, camera.size)) * camera.vignette[..., 0]
    scene += rng.standard_normal(scene.shape, np.float32) * np.float32(_NOISE * camera.noise)
    image = Image.fromarray((np.clip(scene, 0, 1) * 255).astype(np.uint8))
    if camera.blur > 0.1:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur * 1.2))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=camera.quality)
    return file.getvalue(), drawing


def _slow(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """float32 [height, width] in about [-1, 1], varying over half a picture."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (4, 3)).astype(np.float32))
    return np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))
