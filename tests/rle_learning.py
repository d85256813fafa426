"""Training RLE on the synthetic visible-infrared world in this process, and scoring both directions: for test and bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import learning

DIRECTIONS = ("regdb-visible-to-thermal", "regdb-thermal-to-visible")


def learn(root: Path, *words: str, people: int = 400, images: int = 5) -> dict[str, Any]:
    """{"untrained", "trained": {direction: record}, "steps", "seconds"} of `rle/synthetic` on one process.

    `people` are halved by the division that the recipe names, `images` in each modality of everybody; `words` are
    overrides.
    """
    world = {"num_train": 0, "num_test": people, "images_per_id": images}
    run = learning.learn(root, "rle/synthetic", DIRECTIONS, words, **world)
    return {key: run[key] for key in ("untrained", "trained", "steps", "seconds")}
