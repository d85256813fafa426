"""Combinations of the `axes` of a sweep: all of a grid, or seeded draws. Optuna chooses its own (tuning/search.py).

A draw of a combination depends on (search.seed, number of the combination, axis) alone: asking for more samples adds to those
that there were, so that an extended sweep runs only what is new.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from reid_dist.config import RecipeError
from tuning.sweep import Axis, Sweep

Setting = dict[str, Any]  # recipe key -> value
MANY = 10_000


def combinations(sweep: Sweep) -> Iterator[Setting]:
    """Settings of the sweep in order; for random without end (the caller stops). Raises RecipeError."""
    if sweep.search.name == "grid":
        values = {key: grid_values(key, axis) for key, axis in sweep.axes.items()}
        size = math.prod(len(v) for v in values.values())
        if size > MANY:
            raise RecipeError(
                f"the grid has {size} combinations: take axes away, or search.name=random with search.samples"
            )
        for choice in itertools.product(*values.values()):
            yield dict(zip(values, choice, strict=True))
        return
    for number in itertools.count():
        yield {key: draw(axis, sweep.search.seed, number, key) for key, axis in sweep.axes.items()}


def grid_values(key: str, axis: Axis) -> list[Any]:
    """All values of an axis. Raises RecipeError for a distribution without `steps`."""
    if axis.values:
        return list(axis.values)
    if axis.low is None or axis.high is None or axis.steps is None or axis.mean is not None:
        raise RecipeError(
            f"axes.{key}: a grid needs a list of values, or low, high and steps; or choose search.name=random"
        )
    spaced = np.geomspace if axis.log else np.linspace
    exact = [_shaped(axis, float(value)) for value in spaced(axis.low, axis.high, axis.steps)]
    return list(dict.fromkeys(exact))


def draw(axis: Axis, seed: int, number: int, key: str) -> Any:
    """The value of one axis in combination `number`."""
    digest = hashlib.sha256(f"{seed}/{number}/{key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    if axis.values:
        return axis.values[int(rng.integers(len(axis.values)))]
    if axis.mean is not None and axis.std is not None:
        value = float(rng.normal(axis.mean, axis.std))
        low, high = -math.inf if axis.low is None else axis.low, math.inf if axis.high is None else axis.high
        return _shaped(axis, min(max(value, low), high))
    low, high = float(axis.low or 0.0), float(axis.high or 0.0)
    if axis.integer:
        low, high = math.ceil(low), math.floor(high) + 1 - 1e-9  # every integer of the range alike
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if axis.log else float(rng.uniform(low, high))
    return math.floor(value) if axis.integer else _shaped(axis, value)


def _shaped(axis: Axis, value: float) -> int | float:
    """An integer where the axis wants one; else six digits, so that a table shows the value that was used."""
    return round(value) if axis.integer else float(f"{value:.6g}")
