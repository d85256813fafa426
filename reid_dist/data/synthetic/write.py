"""Write a synthetic world in an authors' layout, so that the real parsers, packers and protocols run on it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reid_dist.data import layouts
from reid_dist.data.layouts.base import Sample
from reid_dist.data.synthetic.world import World
from reid_dist.errors import UserError

# What a layout needs beyond the text demo's defaults, from the shape of the real set.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cuhk-pedes": {},
    "icfg-pedes": {"num_val": 0, "captions_per_image": 1},
    "rstpreid": {"images_per_id": 5, "cameras_per_id": 5},
    "market-1501": {
        "difficulty": "strong",
        "num_train": 300,
        "num_val": 0,
        "num_distractors": 60,
        "images_per_id": 12,
    },
}


def world_for(layout: str, **options: Any) -> World:
    """The world that `write_synthetic` draws. Raises UserError for an unknown layout or option, or one that does not
    fit.
    """
    if layouts.get(layout).name not in PRESETS:
        raise UserError(f"layout {layout!r} has no synthetic form; choose one of {', '.join(sorted(PRESETS))}")
    fields = [field.name for field in dataclasses.fields(World)]
    for name in options:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"synthetic world has no option {name!r}: {hint}")
    world = World(**{**PRESETS[layout], **options})
    if "num_val" in PRESETS[layout] and world.num_val:
        raise UserError(f"num_val={world.num_val}: layout {layout} has no val split; leave it at 0")
    if layout == "market-1501" and world.num_cameras > 6:
        raise UserError(f"num_cameras={world.num_cameras}: layout {layout} names cameras 1 to 6")
    return world


def write_synthetic(folder: str | Path, layout: str = "cuhk-pedes", *, progress: bool = False, **options: Any) -> World:
    """Draw a world and write it below `folder`, which must be new or empty, exactly as the layout's authors would.

    `options` are fields of World; `progress` shows a bar on stderr. Returns the world. Raises UserError.
    """
    world, form, target = world_for(layout, **options), layouts.get(layout), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty: give a new or empty folder for the synthetic {layout}")
    samples = world.text_samples() if form.task == "text" else world.image_samples()
    target.mkdir(parents=True, exist_ok=True)
    form.write(target, _counted(samples, world.num_samples(form.task), layout) if progress else samples)
    return world


def _counted(samples: Iterable[Sample], total: int, layout: str) -> Iterable[Sample]:
    from tqdm import tqdm

    return tqdm(samples, total=total, desc=f"synthetic {layout}", unit="image")
