"""Cameras of the synthetic world: what each does to a scene, fixed per camera (datasets specification 8.2).

A camera casts its light (3 x 3 colour matrix, gamma, vignette), has its own background, blur, noise and JPEG quality,
and sees people mostly from some sides. `Difficulty.cast` grades all of it with one number: "mild" is the 0.4 of the
text trial in 8.3; at "strong" (1.0) the camera changes raw pixels more than the identity does, so that nearest-pixel
matching mostly returns the same camera and the same-camera rule of the protocols matters.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from reid_dist.data.synthetic.domain import Style
from reid_dist.data.synthetic.seeds import stream

YAWS = 8  # sides that a person can be seen from
_LEVELS = 1023  # quantisation of the gamma table


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How hard the pictures are."""

    cast: float  # strength of a camera's colour cast, gamma, vignette, background colour
    noise: float  # mean standard deviation of sensor noise, 0..1
    blur: float  # mean radius in pixels at 64 x 32
    occlusion: float  # share of images with a thing in front
    crop: float  # standard deviation of the detector's box error, in image sizes


DIFFICULTIES: Mapping[str, Difficulty] = {
    "mild": Difficulty(cast=0.4, noise=0.02, blur=0.35, occlusion=0.10, crop=0.02),
    "strong": Difficulty(cast=1.0, noise=0.035, blur=0.5, occlusion=0.20, crop=0.03),
}


@dataclass(frozen=True, slots=True)
class Camera:
    """One camera at one image size. `render` of the figure happens before, `expose` after."""

    index: int
    size: tuple[int, int]  # height, width
    matrix: np.ndarray  # float32 [3, 3]
    curve: np.ndarray  # uint8 [1024]: gamma of intensities 0..1
    backdrop: np.ndarray  # float32 [height * 5 // 4, width * 4, 3]
    vignette: np.ndarray  # float32 [height, width, 1]
    blur: float  # pixels
    noise: float
    quality: int  # JPEG
    yaws: np.ndarray  # float [YAWS], probabilities
    detail: float = 1.0  # share of the resolution that is kept

    def background(self, rng: np.random.Generator) -> np.ndarray:
        """float32 [height, width, 3]: the part of the scene behind one box."""
        height, width = self.size
        top = int(rng.integers(0, self.backdrop.shape[0] - height + 1))
        left = int(rng.integers(0, self.backdrop.shape[1] - width + 1))
        return self.backdrop[top : top + height, left : left + width]

    def expose(self, scene: np.ndarray, rng: np.random.Generator) -> bytes:
        """JPEG bytes of a scene, float32 [height, width, 3] in [0, 1]."""
        light = (scene * self.vignette) @ self.matrix
        light += rng.standard_normal(light.shape, np.float32) * np.float32(self.noise)
        pixels = self.curve[np.clip(light * _LEVELS, 0, _LEVELS).astype(np.int16)]
        image = Image.fromarray(pixels)
        if self.detail < 1:
            height, width = self.size
            small = image.resize((round(width * self.detail), round(height * self.detail)), Image.Resampling.BOX)
            image = small.resize((width, height), Image.Resampling.BILINEAR)
        if self.blur > 0.1:
            image = image.filter(ImageFilter.GaussianBlur(self.blur))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.quality)
        return file.getvalue()


def draw_camera(
    seed: int, domain: str, index: int, difficulty: Difficulty, size: tuple[int, int], look: Style
) -> Camera:
    """Camera `index` of a domain; draws do not depend on the size, so two sizes see the same place."""
    rng = stream(seed, domain, "camera", index)
    cast = difficulty.cast * look.spread
    matrix = np.eye(3) + cast * (np.diag(rng.normal(0, 0.22, 3)) + rng.normal(0, 0.06, (3, 3)))
    matrix *= 1 + cast * rng.uniform(-0.3, 0.3)
    gamma = float(np.exp(cast * rng.uniform(-0.5, 0.5)))
    curve = (np.linspace(0, 1, _LEVELS + 1) ** gamma * 255).round().astype(np.uint8)
    height, width = size
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    centre, slope = rng.uniform(-0.4, 0.4, 2), cast * rng.uniform(0.1, 0.5)
    vignette = 1 - slope * np.clip((x - centre[0]) ** 2 + (y - centre[1]) ** 2, 0, 2) / 2
    favourite, spread = int(rng.integers(YAWS)), 1.4
    apart = np.abs((np.arange(YAWS) - favourite + YAWS // 2) % YAWS - YAWS // 2)
    yaws = np.exp(-((apart / spread) ** 2)) + 0.05
    return Camera(
        index=index,
        size=size,
        matrix=np.clip(matrix, -0.5, 1.7).astype(np.float32),
        curve=curve,
        backdrop=_backdrop(rng, cast, size, look),
        vignette=vignette.astype(np.float32)[..., None],
        blur=float(difficulty.blur * rng.uniform(0.5, 1.5)) * height / 64,
        noise=float(difficulty.noise * rng.uniform(0.5, 1.5)),
        quality=int(rng.integers(70, 93)),
        yaws=yaws / yaws.sum(),
        detail=look.detail,
    )


def _backdrop(rng: np.random.Generator, cast: float, size: tuple[int, int], look: Style) -> np.ndarray:
    """A wall above a ground, each with its palette, blotches and lines."""
    height, width = size[0] * 5 // 4, size[1] * 4
    wall, ground = (0.5 + (0.2 + 0.8 * cast) * rng.uniform(-0.4, 0.4, 3) + look.tint for _ in range(2))
    horizon = int(height * rng.uniform(0.45, 0.75))
    scene = np.empty((height, width, 3), np.float32)
    scene[:horizon], scene[horizon:] = wall, ground
    blotches = Image.fromarray(rng.uniform(-1, 1, (7, 24)).astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    scene += 0.12 * np.asarray(blotches)[..., None]
    pitch, tilt = rng.uniform(0.15, 0.6) * size[0] * look.grain, rng.uniform(-1.5, 1.5)
    y, x = np.mgrid[:height, :width]
    tiles = (np.mod(x + tilt * y, pitch) < size[0] / 40) & (y >= horizon)
    posts = (np.mod(x, pitch * rng.uniform(1.2, 3)) < size[0] / 25) & (y < horizon)
    scene[tiles] *= 0.75
    scene[posts] *= rng.uniform(0.6, 1.3)
    return np.clip(scene, 0.03, 0.97)
