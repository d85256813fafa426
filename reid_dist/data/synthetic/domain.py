"""How one domain looks different from another, graded by a single number (datasets specification 8.2).

The direction of the difference belongs to the domain's name, its size to `shift` in [0, 1]: other garments are common,
dyes turn a little (named colours keep their names), walls and grounds have another tint and grain, cameras spread more
and resolve less. At shift 0 all domains are drawn alike (but of other people and cameras).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reid_dist.data.synthetic.identity import ATTRIBUTES, PRIOR
from reid_dist.data.synthetic.seeds import stream

_TILT = 1.3  # standard deviation of a garment's log odds at shift 1
_TURN = math.radians(18)  # of the colour circle
_GREY = np.ones(3) / math.sqrt(3)


@dataclass(frozen=True, slots=True)
class Style:
    """One domain at one shift."""

    prior: Mapping[str, tuple[float, ...]]  # attribute: probability of each value
    turn: np.ndarray  # float [3, 3], applied to dyes
    tint: np.ndarray  # float [3], added to backgrounds
    grain: float  # factor on the pitch of tiles and posts
    detail: float  # share of the resolution that the camera keeps
    spread: float  # factor on the cameras' cast


def style(domain: str, shift: float) -> Style:
    """The look of a domain; `shift` 0 changes nothing."""
    rng = stream(domain, "style")
    prior = {}
    for name, values in ATTRIBUTES.items():
        base = np.array(PRIOR.get(name, (1 / len(values),) * len(values)))
        weights = base * np.exp(_TILT * shift * rng.standard_normal(len(values)))
        prior[name] = tuple((weights / weights.sum()).tolist()) if shift else PRIOR.get(name, ())
    angle = shift * _TURN * float(rng.choice((-1, 1)))
    tint = shift * 0.25 * rng.uniform(-1, 1, 3)
    return Style(
        prior={name: odds for name, odds in prior.items() if odds},
        turn=_rotation(angle),
        tint=tint,
        grain=math.exp(shift * float(rng.uniform(-0.9, 0.9))),
        detail=1 - shift * float(rng.uniform(0.35, 0.55)),
        spread=1 + 0.4 * shift,
    )


def _rotation(angle: float) -> np.ndarray:
    """Rotation about the grey axis, [3, 3]: hues turn, greys stay."""
    x, y, z = _GREY
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn: np.ndarray = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)
    return turn
