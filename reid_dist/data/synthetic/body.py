"""The figure's geometry: an articulated body as an ordered list of material-tagged outlines.

Datasets specification 8.2. Lengths are in body heights; x to the person's left, y up from the floor, z forward. Yaw
turns the body about y (0 faces the camera) and the projection is orthographic. Nothing here knows a colour: a visible
image, an infrared image and the part masks are three *shadings* of the same outlines (shade by material, by
emissivity, by part).

Limbs are tapered capsules; torso, skirts, bags are stacks of elliptic cross-sections; patterns are patches on the
torso's surface (azimuth, height), so they turn with the body.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_TURN = np.linspace(-math.pi / 2, math.pi / 2, 6)
_CAP = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)  # half circle towards +x
_ROUND = np.linspace(0, 2 * math.pi, 14, endpoint=False)
_CIRCLE = np.stack([np.cos(_ROUND), np.sin(_ROUND)], axis=1)

Level = tuple[float, float, float]  # height, half width, half depth of one cross-section


@dataclass(frozen=True, slots=True)
class Shape:
    """One outline of the projected figure, in painter's order (far first) within its list."""

    outline: np.ndarray  # float [n, 2] x, y in body heights
    material: str  # skin hair hat upper print inner lower shoe bag face ...: what it is made of
    part: str  # head torso arm leg foot bag: where it belongs, for masks
    shade: float  # factor on the material's colour (folds, far limbs)
    depth: float  # towards the camera
    cues: tuple[str, ...]  # attributes that can be seen on it


@dataclass(frozen=True, slots=True)
class View:
    """How one image sees the person."""

    yaw: float  # radians, 0 facing the camera
    phase: float  # of the stride, radians
    scale: float  # image heights per body height
    shift_x: float  # of the person's axis from the image centre, in image widths
    foot: float  # height of the soles above the lower edge, in image heights
    occluder: tuple[float, float, float, float] | None = None  # x, y, width, height of a thing in front, in image sizes
    light: float = 1.0  # gain of the whole figure


class Sketch:
    """Collects outlines under one yaw."""

    def __init__(self, yaw: float, width: float) -> None:
        self.cos, self.sin, self.width = math.cos(yaw), math.sin(yaw), width
        self.shapes: list[Shape] = []

    def flat(self, x: float, y: float, z: float) -> tuple[float, float, float]:
        """Projected x, y and depth of a body point."""
        x *= self.width
        return x * self.cos + z * self.sin, y, z * self.cos - x * self.sin

    def add(
        self, outline: np.ndarray, material: str, part: str, depth: float, cues: Sequence[str], shade: float
    ) -> None:
        """Append an outline [n, 2]."""
        self.shapes.append(Shape(outline, material, part, shade, depth, tuple(cues)))

    def capsule(self, a: Sequence[float], b: Sequence[float], ra: float, rb: float, material: str, part: str,
                cues: Sequence[str] = (), shade: float = 1.0, lift: float = 0.0) -> None:  # fmt: skip
        """A limb from `a` to `b` (x, y, z) with end radii `ra`, `rb`; `lift` moves it in the painter's order."""
        ax, ay, ad = self.flat(*a)
        bx, by, bd = self.flat(*b)
        length = math.hypot(bx - ax, by - ay)
        ux, uy = ((bx - ax) / length, (by - ay) / length) if length > 1e-6 else (1.0, 0.0)
        turn = np.array([[ux, uy], [-uy, ux]])
        ends = np.concatenate([_CAP * rb, _CAP * -ra]) @ turn
        ends[:6] += (bx, by)
        ends[6:] += (ax, ay)
        self.add(ends, material, part, (ad + bd) / 2 + lift, cues, shade)

    def ball(self, centre: Sequence[float], rx: float, ry: float, material: str, part: str,
             cues: Sequence[str] = (), shade: float = 1.0, lift: float = 0.0) -> None:  # fmt: skip
        """An upright ellipse about a body point."""
        x, y, depth = self.flat(*centre)
        self.add(_CIRCLE * (rx, ry) + (x, y), material, part, depth + lift, cues, shade)

    def reach(self, half_width: float, half_depth: float) -> float:
        """Half width of an elliptic cross-section's silhouette."""
        return math.hypot(half_width * self.width * self.cos, half_depth * self.sin)

    def stack(self, levels: Sequence[Level], material: str, part: str, cues: Sequence[str] = (), shade: float = 1.0,
              lift: float = 0.0, at: tuple[float, float] = (0.0, 0.0)) -> None:  # fmt: skip
        """Cross-sections on the vertical axis through `at` (x, z)."""
        x, _, depth = self.flat(at[0], 0.0, at[1])
        sides = [(self.reach(half, deep), y) for y, half, deep in levels]
        outline = np.array([(x + r, y) for r, y in sides] + [(x - r, y) for r, y in reversed(sides)])
        self.add(outline, material, part, depth + lift, cues, shade)

    def patch(self, levels: Sequence[Level], left: float, right: float, material: str, cues: Sequence[str],
              shade: float = 1.0, lift: float = 0.0) -> None:  # fmt: skip
        """The part of a stack's surface between two azimuths (0 is the chest, pi the back); nothing when it faces
        away.
        """
        left, right = self._facing(left, right)
        if right - left < 0.05:
            return
        edge = [[self._on(level, azimuth) for level in levels] for azimuth in (left, right)]
        self.add(np.array(edge[0] + edge[1][::-1]), material, "torso", lift, cues, shade)

    def _on(self, level: Level, azimuth: float) -> tuple[float, float]:
        y, half, deep = level
        return half * self.width * math.sin(azimuth) * self.cos + deep * math.cos(azimuth) * self.sin, y

    def _facing(self, left: float, right: float) -> tuple[float, float]:
        """Clip an azimuth range to the half that the camera sees (centre -yaw in this frame's sense)."""
        centre = math.atan2(-self.sin, self.cos)
        middle = (left + right) / 2
        turn = round((middle - centre) / (2 * math.pi)) * 2 * math.pi
        low, high = centre - 1.4 + turn, centre + 1.4 + turn
        return max(left, low), min(right, high)
