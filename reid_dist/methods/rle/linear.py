"""Random linear enhancement: the two operators and erasing, as pure functions of an image and its draws.

RLE (NeurIPS 2024) section 3 and Algorithm 1, by methods/rle.md section 5: moderate enhancement writes one random
convex mixture of the channels into all of them; radical enhancement multiplies random rectangles, channel by channel,
by random gains until some pixel's cumulative gain is small. Ours: where a rectangle is black in a channel its maximum
counts as 1 (the original divides by zero).

Draws come one by one from a `Source` in the original's order, so recorded draws replay; in training it is the row's own
generator (data/draws.py). Images are float32 [channels, rows, columns] in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

SMALLEST = np.finfo(np.float32).tiny  # maxima below have no finite inverse
ATTEMPTS = 100  # proposals per image at most
ERASE_FILL = (0.4914, 0.4822, 0.4465)  # CIFAR-10's means, in units before normalisation


class Source(Protocol):
    """Where draws come from; numpy.random.Generator is one."""

    def random(self) -> float: ...

    def uniform(self, low: float, high: float) -> float: ...

    def integers(self, low: int, high: int) -> int:
        """Uniform in low ... high - 1."""
        ...

    def beta(self, a: float, b: float) -> float: ...


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index into [channels, rows, columns]."""
        return slice(None), slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle and the target maximum of each channel in it."""

    box: Box
    factors: tuple[float, ...]


def applies(u: float, p: float) -> bool:
    """The rule of all three operators: a uniform draw that equals the probability still applies."""
    return u <= p


def box_size(area: float, aspect: float, rows: int, columns: int) -> tuple[int, int] | None:
    """(height, width) of a proposal, halves rounded to even; None unless it is smaller than the image both ways.

    A height or width that rounds to 0 (images of a few pixels) does not fit either.
    """
    height = round(math.sqrt(area * rows * columns * aspect))
    width = round(math.sqrt(area * rows * columns / aspect))
    return (height, width) if 0 < height < rows and 0 < width < columns else None


def draw_box(source: Source, rows: int, columns: int, area: tuple[float, float], least_aspect: float) -> Box | None:
    """One proposal: area share and aspect uniform, then the place. None when it does not fit (no further draws)."""
    share, aspect = source.uniform(*area), source.uniform(least_aspect, 1 / least_aspect)
    size = box_size(share, aspect, rows, columns)
    if size is None:
        return None
    top, left = source.integers(0, rows - size[0] + 1), source.integers(0, columns - size[1] + 1)
    return Box(int(top), int(left), *size)


def propose_regions(
    source: Source,
    shape: tuple[int, int, int],
    area: tuple[float, float] = (0.02, 0.4),
    least_aspect: float = 0.3,
    beta: float = 0.4,
) -> Iterator[Region | None]:
    """Proposals of radical enhancement, drawn as they are asked for; None: one that does not fit.

    One-channel images draw from Beta(0.5, 0.5) whatever `beta` is: the original's rule.
    """
    channels, rows, columns = shape
    b = 0.5 if channels == 1 else beta
    for _ in range(ATTEMPTS):
        box = draw_box(source, rows, columns, area, least_aspect)
        yield None if box is None else Region(box, tuple(float(source.beta(b, b)) for _ in range(channels)))


def mix_weights(draws: Iterable[float]) -> np.ndarray:
    """Beta draws -> float64 weights that sum to 1; even ones should all draws underflow to 0."""
    values = np.array(list(draws), dtype=np.float64)
    total = values.sum()
    return values / total if total > 0 else np.full(len(values), 1.0 / len(values))


def mix_channels(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Moderate enhancement: the mixture of the three channels as every channel. A read-only view of one plane."""
    w = weights.astype(np.float32)
    plane = image[0] * w[0]
    plane += image[1] * w[1]
    plane += image[2] * w[2]
    return np.broadcast_to(plane, image.shape)


def scale_in_place(image: np.ndarray, regions: Iterable[Region | None], threshold: float = 0.1) -> tuple[int, int]:
    """Radical enhancement of `image` itself: (proposals used, regions applied).

    Stops once some cumulative gain is below `threshold`. Only the newest rectangle can have brought one there, so the
    gains are looked up inside it alone; and while there has been one rectangle, they are its channels' gains.
    """
    gains: np.ndarray | None = None  # cumulative, made when a second rectangle needs it
    first: tuple[Box, np.ndarray] | None = None
    attempts = applied = 0
    for region in regions:
        attempts += 1
        if region is None:
            continue
        applied += 1
        place = region.box.slices
        patch = image[place]
        top = patch.max(axis=(1, 2))
        top[top < SMALLEST] = 1  # black: the original divides by zero here
        inverse = (np.float32(1) / top)[:, None, None]
        factors = np.array(region.factors, dtype=np.float32)[:, None, None]
        patch *= inverse
        patch *= factors
        if first is None:
            first = region.box, inverse * factors
            least = float(first[1].min())
        else:
            if gains is None:
                gains = np.ones_like(image)
                gains[first[0].slices] = first[1]
            inside = gains[place]
            inside *= inverse
            inside *= factors
            least = float(inside.min())
        if least < threshold:
            break
    return attempts, applied


def scale_regions(
    image: np.ndarray, regions: Iterable[Region | None], threshold: float = 0.1
) -> tuple[np.ndarray, int, int]:
    """`scale_in_place` on a copy: (result, proposals used, regions applied)."""
    out = image.copy()
    return out, *scale_in_place(out, regions, threshold)


def first_fit(
    source: Source, rows: int, columns: int, area: tuple[float, float] = (0.02, 0.4), least_aspect: float = 0.3
) -> Box | None:
    """The rectangle that random erasing fills: the first of at most 100 proposals that fits, or None."""
    proposals = (draw_box(source, rows, columns, area, least_aspect) for _ in range(ATTEMPTS))
    return next((box for box in proposals if box is not None), None)


def erase(image: np.ndarray, box: Box | None, fill: tuple[float, ...] = ERASE_FILL) -> np.ndarray:
    """A copy with `box` filled by one constant per channel (a one-channel image: the first). None: unchanged."""
    out = image.copy()
    if box is not None:
        out[box.slices] = np.array(fill[: len(image)], dtype=np.float32)[:, None, None]
    return out
