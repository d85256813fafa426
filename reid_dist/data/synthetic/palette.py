"""The visible-light shading: which colour each material of a figure has (RGB in [0, 1], linear enough for our purpose).

An infrared world replaces this table by one of emissivities that do not depend on colour; the outlines stay.
"""

from __future__ import annotations

import numpy as np

from reid_dist.data.synthetic.identity import Identity

COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (0.09, 0.09, 0.10),
    "white": (0.93, 0.93, 0.91),
    "grey": (0.50, 0.51, 0.52),
    "red": (0.80, 0.10, 0.11),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.94, 0.85, 0.18),
    "green": (0.13, 0.55, 0.22),
    "blue": (0.14, 0.28, 0.74),
    "purple": (0.46, 0.18, 0.62),
    "pink": (0.95, 0.55, 0.70),
    "brown": (0.42, 0.26, 0.14),
    "blond": (0.88, 0.74, 0.42),
}
HAIR = {
    "black": (0.07, 0.06, 0.06),
    "brown": (0.33, 0.19, 0.10),
    "blond": (0.86, 0.72, 0.40),
    "grey": (0.66, 0.66, 0.67),
}
_SKIN = ((0.93, 0.76, 0.65), (0.42, 0.27, 0.18))  # light, dark
_LIGHT, _DARK = (0.95, 0.95, 0.90), (0.10, 0.11, 0.18)


def rgb(person: Identity, turn: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{material: float [3]} of one person. Dyes of one name differ a little between people (`fabric`), and between
    domains by `turn` [3, 3].
    """
    wear, dye = person.attributes, 0.045 * np.array(person.fabric).reshape(3, 3)
    upper = np.array(COLOURS[wear["upper_colour"]])
    contrast = _DARK if upper.mean() > 0.45 else _LIGHT
    light, dark = np.array(_SKIN[0]), np.array(_SKIN[1])
    table = {
        "skin": light + (dark - light) * person.skin,
        "hair": np.array(HAIR[wear["hair_colour"]]),
        "upper": upper + dye[0],
        "print": np.array(contrast),
        "inner": np.array(contrast) * 0.9,
        "lower": np.array(COLOURS[wear["lower_colour"]]) + dye[1],
        "shoe": np.array(COLOURS[wear["shoe_colour"]]) + dye[2],
        "dark": np.array(_DARK),
        "hat": np.array(COLOURS[wear.get("hat_colour", "black")]),
        "bag": np.array(COLOURS[wear.get("bag_colour", "black")]),
        "occluder": np.array((0.36, 0.38, 0.36)),
    }
    for material in ("upper", "lower", "shoe", "hat", "bag"):
        table[material] = table[material] if turn is None else turn @ table[material]
    return {material: np.clip(colour, 0.02, 0.98) for material, colour in table.items()}
