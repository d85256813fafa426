"""Part masks into the side tables that recipes name: `python -m reid_dist.methods.muva VERB WHAT key=value ...`.

    import-masks FILE    an official mask file (a pickle, read without running anything in it; local or s3://) for the
                         training images of the packed table table=
    draw-masks LAYOUT    exact masks of a synthetic world's training images; other keys are the world's options
    draw-pair FOLDER     two synthetic domains in Market-1501's layout, FOLDER/raw-a and FOLDER/raw-b, and masks of both in
                         the side tables synthetic-a-masks and synthetic-b-masks; name= and root= are not needed

Keys of both: name= the side table to write, root= the folder or prefix with tables/; image_size=[256,128], patch=16,
stride=16 give the grid; splits=[train] whose images (a recipe with data.train_splits needs masks of them all). The
record is the last line of stdout; exit 2 for bad input.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from reid_dist.config import DataConfig
from reid_dist.errors import UserError
from reid_dist.methods.command import content_of, run_command, words_and_options

USAGE = (
    "usage: python -m reid_dist.methods.muva import-masks FILE table=NAME name=NAME root=URI [splits=[train]] "
    "[image_size=[256,128]], or draw-masks LAYOUT name=NAME root=URI [image_size=[64,32] patch=8 stride=8] [world options], "
    "or draw-pair FOLDER"
)
LAYOUT = "market-1501"  # of the synthetic pair
SPLITS = ("train", "val", "query", "gallery")
SHAPE = {"image_size": [256, 128], "stride": 16, "patch": 16}

logger = logging.getLogger("reid_dist.methods.muva")


def import_masks(
    path: str, table: str, name: str, root: str, grid: tuple[int, int], splits: Sequence[str] = ("train",)
) -> dict[str, Any]:
    """Convert an official mask file for the people's images of some splits of a table; returns the record. Raises UserError."""
    from reid_dist.data.leaks import only_people
    from reid_dist.data.store import open_view
    from reid_dist.methods.muva.mask_pickle import masks_of_pickle
    from reid_dist.methods.muva.masks import write_masks

    view = only_people(open_view(DataConfig(root=root), (table,), tuple(splits)))
    file = path.rpartition("/")[2]
    version = write_masks(
        root, name, masks_of_pickle(content_of(path), path, view, grid), grid, f"official file {file}"
    )
    return {"side_table": name, "version": version, "images": len(view), "grid": list(grid)}


def draw_masks(
    layout: str, name: str, root: str, grid: tuple[int, int], splits: Sequence[str] = ("train",), **world: Any
) -> dict[str, Any]:
    """Write the exact masks of the images of some splits of a synthetic world; returns the record. Raises UserError."""
    from reid_dist.data.synthetic import world_for
    from reid_dist.methods.muva.exact import exact_masks
    from reid_dist.methods.muva.masks import write_masks

    rows = list(exact_masks(world_for(layout, **world), layout, grid, splits))
    version = write_masks(root, name, rows, grid, "exact, from the synthetic renderer")
    return {"side_table": name, "version": version, "images": len(rows), "grid": list(grid)}


PAIR: dict[str, dict[str, Any]] = {
    "a": {"shift": 0.0},
    "b": {"shift": 0.6},
}  # how far each domain's look is from the others'


def draw_pair(folder: str, grid: tuple[int, int] = (8, 4), **world: Any) -> dict[str, Any]:
    """Write domains A and B and the masks of their training images; returns the record. Raises UserError."""
    from reid_dist.data.synthetic import write_synthetic

    masks = {}
    for domain, look in PAIR.items():
        options = {"domain": domain, **look, **world}
        write_synthetic(f"{folder}/raw-{domain}", LAYOUT, progress=True, **options)
        masks[domain] = draw_masks(LAYOUT, f"synthetic-{domain}-masks", folder, grid, **options)
        logger.info(
            "next: python -m jobs.pack %s %s/raw-%s root=%s name=synthetic-%s", LAYOUT, folder, domain, folder, domain
        )
    return {"folder": folder, "masks": masks}


def main(argv: list[str]) -> dict[str, Any]:
    """The command. Raises UserError."""
    words, options = words_and_options(argv)
    if len(words) == 2 and words[0] == "draw-pair":
        return draw_pair(words[1], **options)
    if len(words) != 2 or words[0] not in ("import-masks", "draw-masks") or not {"name", "root"} <= set(options):
        raise UserError(USAGE)
    name, root = str(options.pop("name")), str(options.pop("root"))
    size, stride, patch = (options.pop(key, usual) for key, usual in SHAPE.items())
    numbers = [*size, stride, patch] if isinstance(size, list) and len(size) == 2 else [0]
    if not all(isinstance(number, int) and number > 0 for number in numbers) or min(size) < patch:
        raise UserError(f"image_size={size}, patch={patch}, stride={stride}: no grid of patches. {USAGE}")
    rows, columns = ((number - patch) // stride + 1 for number in size)
    splits = options.pop("splits", ["train"])
    if not isinstance(splits, list) or not splits or set(splits) - set(SPLITS):
        raise UserError(f"splits={splits}: name some of {', '.join(SPLITS)}. {USAGE}")
    if words[0] == "draw-masks":
        return draw_masks(words[1], name, root, (rows, columns), splits, **options)
    if set(options) != {"table"}:
        raise UserError(f"import-masks takes table=, got {', '.join(sorted(options)) or 'none'}. {USAGE}")
    return import_masks(words[1], str(options["table"]), name, root, (rows, columns), splits)


if __name__ == "__main__":
    run_command(main)
