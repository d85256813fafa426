"""From an identity and a view to the ordered outlines of the dressed figure (datasets specification 8.2).

Every outline names the attributes that can be read off it (`cues`), so what a caption may truthfully mention about one
image follows from the pixels that are left after the figure has been drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from reid_dist.data.synthetic.body import Level, Shape, Sketch, View
from reid_dist.data.synthetic.identity import ABSENT, Attributes, Identity

# Painter's layers: legs lie below the garments of the trunk whatever the stride, the head above them.
LEGS, SKIRT, TRUNK, HEAD = -2.0, -1.0, 0.0, 0.3
_TORSO: tuple[Level, ...] = (
    (0.835, 0.060, 0.050),
    (0.810, 0.128, 0.072),
    (0.750, 0.140, 0.088),
    (0.660, 0.126, 0.088),
    (0.580, 0.112, 0.080),
    (0.500, 0.126, 0.092),
)
_HEM: dict[str, tuple[Level, ...]] = {
    "shirt": ((0.485, 0.126, 0.092),),
    "hoodie": ((0.470, 0.134, 0.100),),
    "jacket": ((0.450, 0.140, 0.102),),
    "coat": ((0.400, 0.140, 0.108), (0.270, 0.168, 0.130)),
}
_THIGH, _SHANK, _UPPER_ARM, _FOREARM = 0.235, 0.225, 0.165, 0.150


def figure(person: Identity, view: View) -> list[Shape]:
    """Outlines, far first, in body heights (x right of the body's axis, y above the soles)."""
    sketch = Sketch(view.yaw, person.width)
    wear = person.attributes
    _legs(sketch, wear, view.phase)
    _trunk(sketch, wear)
    _arms(sketch, wear, view.phase)
    _bag(sketch, wear, view.phase)
    _head(sketch, wear)
    return sorted(sketch.shapes, key=lambda shape: shape.depth)


def _swing(side: int, phase: float) -> float:
    """Angle of a leg forward of the vertical, radians; the arm of the same side swings against it."""
    return side * 0.42 * math.sin(phase)


def _legs(sketch: Sketch, wear: Attributes, phase: float) -> None:
    trousers, long = wear["lower_type"] == "trousers", wear["lower_length"] == "long"
    lower = ("lower_colour", "lower_type", "lower_length")
    for side in (-1, 1):
        thigh = _swing(side, phase)
        shank = thigh - 0.55 * max(0.0, math.cos(phase) * side)  # the knee bends while the leg comes forward
        hip = (side * 0.058, 0.505, 0.0)
        knee = (side * 0.058, hip[1] - _THIGH * math.cos(thigh), _THIGH * math.sin(thigh))
        ankle = (side * 0.058, knee[1] - _SHANK * math.cos(shank), knee[2] + _SHANK * math.sin(shank))
        toe = (side * 0.070, ankle[1] - 0.022, ankle[2] + 0.075)
        shade = 0.82 if sketch.flat(side * 0.058, 0, 0)[2] < -1e-3 else 1.0
        dressed = trousers and long
        sketch.capsule(
            knee,
            ankle,
            0.045 if dressed else 0.037,
            0.036 if dressed else 0.028,
            "lower" if dressed else "skin",
            "leg",
            lower if trousers else ("lower_length",),
            shade,
            LEGS,
        )
        sketch.capsule(hip, knee, 0.068, 0.050 if dressed else 0.056, "lower" if trousers else "skin", "leg",
                       lower if trousers else (), shade, LEGS + 0.01)  # fmt: skip
        sketch.capsule(
            (ankle[0], ankle[1] - 0.008, ankle[2]),
            toe,
            0.036,
            0.027,
            "shoe",
            "foot",
            ("shoe_colour",),
            shade,
            LEGS + 0.02,
        )
    if trousers:
        sketch.stack(((0.56, 0.108, 0.078), (0.49, 0.124, 0.090)), "lower", "leg", lower, 0.95, LEGS + 0.3)
    else:
        hem = (0.130, 0.165, 0.150) if long else (0.340, 0.158, 0.128)
        sketch.stack(((0.56, 0.106, 0.078), (0.47, 0.132, 0.100), hem), "lower", "leg", lower, 1.0, SKIRT)


def _between(low: float, high: float, levels: Sequence[Level]) -> list[Level]:
    """Cross-sections of `levels` (top first) between two heights, ends interpolated."""

    def at(y: float) -> Level:
        for above, below in itertools.pairwise(levels):
            if above[0] >= y >= below[0]:
                t = (above[0] - y) / (above[0] - below[0])
                return y, above[1] + t * (below[1] - above[1]), above[2] + t * (below[2] - above[2])
        return y, *(levels[0] if y > levels[0][0] else levels[-1])[1:]

    return [at(high), *(level for level in levels if low < level[0] < high), at(low)]


def _trunk(sketch: Sketch, wear: Attributes) -> None:
    kind, levels = wear["upper_type"], (*_TORSO, *_HEM[wear["upper_type"]])
    known = ["upper_colour"] + ["upper_type"] * (kind == "coat") + ["bag"] * (wear["bag"] == ABSENT)
    sketch.stack(levels, "upper", "torso", known, lift=TRUNK)
    _pattern(sketch, wear["pattern"], levels)
    if kind in ("jacket", "coat"):  # worn open: a strip of what is below
        half = 0.34 if kind == "jacket" else 0.16
        sketch.patch(_between(levels[-1][0], 0.83, levels), -half, half, "inner", ("upper_type",), lift=TRUNK + 0.02)
    elif kind == "shirt":  # round neck
        sketch.patch(_between(0.785, 0.835, levels), -0.5, 0.5, "skin", ("upper_type",), lift=TRUNK + 0.02)
    else:  # hood on the back, pouch on the belly
        sketch.ball((0.0, 0.825, -0.062), 0.085, 0.062, "upper", "torso", ("upper_type",), 0.72, TRUNK + 0.03)
        sketch.patch(_between(0.52, 0.60, levels), -0.75, 0.75, "upper", ("upper_type",), 0.68, TRUNK + 0.02)


def _pattern(sketch: Sketch, pattern: str, levels: Sequence[Level]) -> None:
    bottom = levels[-1][0]
    if pattern == "plain":
        sketch.stack(_between(0.64, 0.74, levels), "upper", "torso", ("pattern",), lift=TRUNK + 0.001)
    if pattern in ("striped", "checked"):
        step = 0.068 if pattern == "striped" else 0.085
        high = 0.80
        while high > bottom + 0.03:
            band = _between(max(bottom, high - step * 0.45), high, levels)
            sketch.stack(band, "print", "torso", ("pattern",), lift=TRUNK + 0.005)
            high -= step
    if pattern == "checked":
        for turn in range(8):
            middle = (turn + 0.5) * math.pi / 4
            sketch.patch(
                _between(bottom, 0.81, levels), middle - 0.12, middle + 0.12, "print", ("pattern",), lift=TRUNK + 0.006
            )
    if pattern == "printed":
        for middle in (0.0, math.pi):  # chest and back, as on a team shirt
            sketch.patch(
                _between(0.63, 0.755, levels), middle - 0.72, middle + 0.72, "print", ("pattern",), lift=TRUNK + 0.025
            )


def _arms(sketch: Sketch, wear: Attributes, phase: float) -> None:
    long = wear["sleeve"] == "long"
    for side in (-1, 1):
        shoulder, elbow, hand = _arm(side, phase)
        far = sketch.flat(side * 0.15, 0, 0)[2] < -0.05
        shade, lift = (0.75, -0.1) if far else (0.88, 0.04)
        if long:
            sketch.capsule(elbow, hand, 0.036, 0.032, "upper", "arm", ("sleeve",), shade, lift)
        else:
            sketch.capsule(elbow, hand, 0.030, 0.024, "skin", "arm", ("sleeve",), 0.95, lift)
        sketch.ball((hand[0], hand[1] - 0.02, hand[2]), 0.028, 0.032, "skin", "arm", (), 0.95, lift + 0.001)
        sketch.capsule(shoulder, elbow, 0.047, 0.040, "upper", "arm", ("upper_colour",), shade, lift + 0.002)


def _arm(side: int, phase: float) -> tuple[tuple[float, float, float], ...]:
    """Shoulder, elbow and hand of one arm."""
    upper = -0.85 * _swing(side, phase)
    fore = upper + 0.35
    x = side * 0.150
    elbow = (x + side * 0.018, 0.785 - _UPPER_ARM * math.cos(upper), _UPPER_ARM * math.sin(upper))
    hand = (x + side * 0.024, elbow[1] - _FOREARM * math.cos(fore), elbow[2] + _FOREARM * math.sin(fore))
    return (x, 0.785, 0.0), elbow, hand


def _bag(sketch: Sketch, wear: Attributes, phase: float) -> None:
    kind, cues = wear["bag"], ("bag", "bag_colour")
    if kind == "backpack":
        levels = ((0.815, 0.070, 0.030), (0.79, 0.105, 0.060), (0.60, 0.112, 0.066), (0.575, 0.090, 0.050))
        sketch.stack(levels, "bag", "bag", cues, at=(0.0, -0.135), lift=0.06 if sketch.cos < 0 else -0.02)
        if sketch.cos < 0.6:  # the front pocket of the pack
            sketch.stack(((0.70, 0.075, 0.02), (0.60, 0.080, 0.02)), "bag", "bag", cues, 0.72, 0.07, (0.0, -0.185))
        for x in (-0.085, 0.085):
            sketch.capsule((x, 0.815, 0.055), (x * 1.1, 0.63, 0.092), 0.016, 0.014, "bag", "bag", ("bag",), 0.85, 0.005)
    elif kind == "shoulder bag":
        for z in (0.085, -0.085):
            sketch.capsule((0.085, 0.815, z * 0.7), (-0.150, 0.50, z), 0.013, 0.013, "bag", "bag", ("bag",), 0.85, 0.01)
        pouch: tuple[Level, ...] = ((0.52, 0.040, 0.085), (0.40, 0.045, 0.092))
        sketch.stack(pouch, "bag", "bag", cues, at=(-0.175, 0.01), lift=0.03)
    elif kind == "handbag":
        x, y, z = _arm(1, phase)[2]
        for step in (-0.03, 0.03):
            sketch.capsule((x, y - 0.02, z), (x, y - 0.09, z + step), 0.010, 0.010, "bag", "bag", ("bag",), 0.8, 0.05)
        sketch.stack(((y - 0.085, 0.032, 0.060), (y - 0.19, 0.040, 0.080)), "bag", "bag", cues, 1.0, 0.06, (x, z))


def _head(sketch: Sketch, wear: Attributes) -> None:
    hair = ("hair_colour", "hair_length")
    sketch.capsule((0, 0.83, 0.0), (0, 0.875, 0.01), 0.032, 0.032, "skin", "head", (), 0.85, 0.02)
    sketch.ball((0, 0.925, -0.008), 0.066, 0.074, "hair", "head", hair, 1.0, HEAD)
    if wear["hair_length"] == "long":  # down the back and beside the neck
        falling: tuple[Level, ...] = (
            (0.955, 0.055, 0.045),
            (0.90, 0.078, 0.055),
            (0.79, 0.086, 0.046),
            (0.735, 0.066, 0.030),
        )
        sketch.stack(falling, "hair", "head", hair, 0.93, HEAD if sketch.cos < 0 else -0.03, (0.0, -0.045))
        sketch.stack(falling[1:3], "hair", "head", hair, 0.9, 0.015, (0.0, -0.01))
    if sketch.cos > -0.55:
        narrow = 0.050 * max(0.55, abs(sketch.cos)) if sketch.cos > 0 else 0.022
        sketch.ball((0, 0.910, 0.022), narrow, 0.056, "skin", "head", (), 1.0, HEAD + 0.01)
        if sketch.cos > 0.2:  # eyes
            for x in (-0.022, 0.022):
                sketch.ball((x, 0.917, 0.055), 0.006, 0.005, "dark", "head", (), 1.0, HEAD + 0.02)
    if wear["hat"] == "cap":
        sketch.stack(((0.998, 0.030, 0.030), (0.982, 0.062, 0.064), (0.945, 0.073, 0.076)), "hat", "head",
                     ("hat", "hat_colour"), 1.0, HEAD + 0.05, (0.0, -0.004))  # fmt: skip
        sketch.capsule((0, 0.948, 0.04), (0, 0.940, 0.125), 0.016, 0.012, "hat", "head", ("hat",), 0.8, HEAD + 0.06)
    elif wear["hat"] == "beanie":
        sketch.stack(((1.03, 0.022, 0.022), (1.005, 0.055, 0.058), (0.96, 0.073, 0.078)), "hat", "head",
                     ("hat", "hat_colour"), 1.0, HEAD + 0.05, (0.0, -0.006))  # fmt: skip
        sketch.stack(
            ((0.965, 0.076, 0.082), (0.930, 0.076, 0.082)), "hat", "head", ("hat",), 0.75, HEAD + 0.06, (0.0, -0.006)
        )
    else:
        sketch.ball((0, 0.965, -0.012), 0.052, 0.034, "hair", "head", ("hat", *hair), 1.0, HEAD + 0.012)
