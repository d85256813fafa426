"""Write a synthetic world in an authors' layout, so that the real parsers, packers and protocols run on it."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.data import layouts
from reid_dist.data.layouts.base import SYNTHETIC_MARKER, Sample
from reid_dist.data.synthetic import shots
from reid_dist.data.synthetic.parts import part_mask
from reid_dist.data.synthetic.shots import Shot
from reid_dist.data.synthetic.world import World
from reid_dist.errors import UserError

Plan = Callable[[World], list[Shot]]
_IMAGE = {"difficulty": "strong", "num_train": 300, "num_val": 0, "num_distractors": 60, "images_per_id": 12}
_TARGET = {"difficulty": "strong", "num_train": 0, "num_val": 0, "num_test": 120}
_VIDEO = {"difficulty": "strong", "num_train": 120, "num_val": 0, "max_frames": 16, "twins": 0.25}
_MIXED = {"difficulty": "strong", "num_val": 0, "num_train": 200}

# Per layout: which pictures, and what it needs beyond the text demo's defaults, from the shape of the real set.
FORMS: Mapping[str, tuple[Plan, Mapping[str, Any]]] = {
    "cuhk-pedes": (shots.text_shots, {}),
    "icfg-pedes": (shots.text_shots, {"num_val": 0, "captions_per_image": 1}),
    "rstpreid": (shots.text_shots, {"images_per_id": 5, "cameras_per_id": 5}),
    "ufine6926": (shots.text_shots, {"num_val": 0, "long_captions": True}),
    "market-1501": (shots.market_shots, _IMAGE),
    "dukemtmc-reid": (shots.image_shots, {**_IMAGE, "num_cameras": 8}),
    "occluded-duke": (shots.image_shots, {**_IMAGE, "num_cameras": 8}),
    "msmt17": (shots.image_shots, {**_IMAGE, "num_cameras": 15}),
    "cuhk03-np": (
        shots.image_shots,
        {**_IMAGE, "num_cameras": 2, "cameras_per_id": 2, "images_per_id": 8, "num_distractors": 0},
    ),
    "csv": (shots.image_shots, _IMAGE),
    "cuhk-sysu": (shots.scene_shots, {**_IMAGE, "num_distractors": 0, "images_per_id": 3}),
    "cuhk02": (shots.pair_shots, {**_IMAGE, "num_distractors": 0, "num_cameras": 10}),
    "cuhk03-classic": (shots.classic_shots, {**_TARGET, "num_cameras": 10, "images_per_id": 8, "trials": 20}),
    "prid2011": (shots.prid_shots, {**_TARGET, "num_cameras": 2, "cameras_per_id": 2, "num_distractors": 300}),
    "viper": (partial(shots.two_view_shots, first=0), {**_TARGET, "num_cameras": 2, "cameras_per_id": 2}),
    "grid": (shots.grid_shots, {**_TARGET, "num_cameras": 8, "cameras_per_id": 2, "num_distractors": 300}),
    "i-lids": (shots.loose_shots, {**_TARGET, "images_per_id": 4}),
    "mars": (shots.mars_shots, {**_VIDEO, "num_distractors": 30}),
    "ls-vid": (shots.video_shots, {**_VIDEO, "num_cameras": 15}),
    "dukemtmc-videoreid": (shots.video_shots, {**_VIDEO, "num_cameras": 8}),
    "ilids-vid": (
        shots.two_camera_video_shots,
        {**_VIDEO, "num_train": 0, "num_test": 120, "num_cameras": 2, "cameras_per_id": 2},
    ),
    "sysu-mm01": (shots.sysu_shots, {**_MIXED, "num_val": 20, "images_per_id": 4}),
    "regdb": (
        shots.regdb_shots,
        {**_MIXED, "difficulty": "mild", "num_train": 0, "num_test": 400, "images_per_id": 5, "dual_sensor": True},
    ),
    "llcm": (shots.llcm_shots, {**_MIXED, "num_cameras": 9, "images_per_id": 4}),
}
_WHAT = {"num_val": "val split", "num_train": "training people of its own", "num_distractors": "distractors"}
# Most cameras that a layout's names hold, and how many it must have where that is fixed.
_MOST = {"market-1501": 6, "dukemtmc-reid": 8, "occluded-duke": 8, "msmt17": 15, "grid": 8, "mars": 6, "ls-vid": 15,
         "dukemtmc-videoreid": 8}  # fmt: skip
_EXACTLY = {"cuhk03-np": 2, "cuhk02": 10, "cuhk03-classic": 10, "prid2011": 2, "viper": 2, "ilids-vid": 2,
            "sysu-mm01": 6, "llcm": 9}  # fmt: skip


def world_for(layout: str, **options: Any) -> World:
    """The world that `write_synthetic` draws. Raises UserError for an unknown layout or option, or one that does not
    fit.
    """
    layouts.get(layout)
    fields = [field.name for field in dataclasses.fields(World)]
    for name in options:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"synthetic world has no option {name!r}: {hint}")
    preset = FORMS[layout][1]
    world = World(**{**preset, **options})
    for name in _WHAT:
        if preset.get(name) == 0 and getattr(world, name):
            raise UserError(f"{name}={getattr(world, name)}: layout {layout} has no {_WHAT[name]}; leave it at 0")
    if world.num_cameras > _MOST.get(layout, world.num_cameras):
        raise UserError(f"num_cameras={world.num_cameras}: layout {layout} names cameras 1 to {_MOST[layout]}")
    if world.num_cameras != _EXACTLY.get(layout, world.num_cameras):
        raise UserError(f"num_cameras={world.num_cameras}: layout {layout} has {_EXACTLY[layout]} cameras")
    return world


def plan_synthetic(world: World, layout: str) -> list[Shot]:
    """The pictures of a world in a layout, in the order in which they are written."""
    return FORMS[layout][0](world)


def write_synthetic(
    folder: str | Path,
    layout: str = "cuhk-pedes",
    *,
    progress: bool = False,
    parts: str | Path | None = None,
    **options: Any,
) -> World:
    """Draw a world and write it below `folder`, which must be new or empty, exactly as the layout's authors would.

    A hidden file says that the tree is synthetic and how it was drawn; packing carries it into the table's notes.
    `options` are fields of World; `progress` shows a bar on stderr; `parts` names an .npz file for the exact part
    masks, {image path: bool [3, 128]} (data/synthetic/parts.py). Returns the world. Raises UserError.
    """
    world, form, target = world_for(layout, **options), layouts.get(layout), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty: give a new or empty folder for the synthetic {layout}")
    plan, masks = plan_synthetic(world, layout), list[np.ndarray]()
    target.mkdir(parents=True, exist_ok=True)
    paths = form.write(target, _drawn(world, plan, layout, progress, masks if parts is not None else None))
    facts = {"layout": layout, **dataclasses.asdict(world)}
    (target / SYNTHETIC_MARKER).write_text(json.dumps(facts, default=str), encoding="utf-8")
    if parts is not None:
        Path(parts).parent.mkdir(parents=True, exist_ok=True)
        named: dict[str, Any] = dict(zip(paths, masks, strict=True))
        np.savez_compressed(parts, **named)
    return world


def _drawn(
    world: World, plan: list[Shot], layout: str, progress: bool, masks: list[np.ndarray] | None
) -> Iterator[Sample]:
    from tqdm import tqdm

    for shot in tqdm(plan, desc=f"synthetic {layout}", unit="image", disable=not progress):
        sample, drawing = world.sample(shot)
        if masks is not None:
            masks.append(part_mask(drawing))
        yield sample
