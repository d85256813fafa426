"""Dataset layouts: one strict parser (and writer) per dataset, found by scanning this folder.

A new dataset is one new file here that defines `LAYOUT`; nothing else names it. Files that start with an underscore and
`base.py` hold what layouts share.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from reid_dist.data.layouts._captions import CaptionSet
from reid_dist.data.layouts.base import Layout
from reid_dist.errors import UserError


@cache
def _layouts() -> dict[str, Layout]:
    modules = sorted(info.name for info in pkgutil.iter_modules(__path__))
    found = [
        importlib.import_module(f"{__name__}.{name}").LAYOUT
        for name in modules
        if not name.startswith("_") and name != "base"
    ]
    return {layout.name: layout for layout in found}


def names() -> tuple[str, ...]:
    """All layouts by name, sorted."""
    return tuple(sorted(_layouts()))


def get(name: str) -> Layout:
    """The layout called `name`. Raises UserError with the nearest name."""
    if name in _layouts():
        return _layouts()[name]
    near = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names())}"
    raise UserError(f"unknown dataset layout {name!r}: {hint}")


def caption_set(name: str) -> CaptionSet:
    """How the caption set called `name` is written. Raises UserError when the layout has no captions."""
    get(name)
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    found = [value for module in modules if isinstance(value := getattr(module, "SET", None), CaptionSet)]
    sets = {value.name: value for value in found}
    if name not in sets:
        raise UserError(f"layout {name} has no captions; those that have: {', '.join(sorted(sets))}")
    return sets[name]
