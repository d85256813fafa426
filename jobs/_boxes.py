"""Boxes of body parts, asked for or read from a file, to part masks (methods/muva.md section 5.4)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reid_dist.errors import UserError
from reid_dist.generation.parsing import BOX_FORMATS, parse_boxes
from reid_dist.generation.stages import PARTS

Boxes = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # image digest -> part -> boxes in fractions
FIELDS = ("path", "part", "reply")


def write_boxes(
    boxes: Boxes, root: str, name: str, grid: tuple[int, int], source: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Masks as the next version of side table `name`: (facts for the record, what the page shows per image).

    Raises UserError when there is no image.
    """
    from reid_dist.methods.muva.boxes import boxes_to_patches
    from reid_dist.methods.muva.masks import MaskRow, write_masks

    rows = []
    for image, parts in boxes.items():
        patches = boxes_to_patches(parts, grid)
        rows.append(MaskRow(image, patches.visible, parts, patches.fallback))
    version = write_masks(root, name, rows, grid, source)
    facts = {"version": version, "images": len(rows), "with_fallback": sum(bool(row.fallback) for row in rows)}
    return facts, {row.digest: _shown(row, grid) for row in rows}


def _shown(row: Any, grid: tuple[int, int]) -> dict[str, Any]:
    rows, columns = grid
    patches = {
        part: [
            (n % columns / columns, n // columns / rows, (n % columns + 1) / columns, (n // columns + 1) / rows)
            for n in visible.nonzero()[0].tolist()
        ]
        for part, visible in zip(PARTS, row.visible, strict=True)
    }
    lists = {"Boxes: left, top, right, bottom in percent": [
        f"{part}: {'; '.join(' '.join(f'{100 * value:.0f}' for value in box) for box in boxes) or 'none'}"
        + (" (fixed band)" if part in row.fallback else "")
        for part, boxes in row.boxes.items()
    ]}  # fmt: skip
    return {"lists": lists, "drawn": {"boxes": row.boxes, "patches": patches}}


def boxes_of_replies(content: bytes, place: str, form: str, view: Any) -> tuple[Boxes, int]:
    """(boxes of every image of the view, replies without a well-formed box) of a JSON Lines file.

    A part that has no line, or no box in its reply, has no boxes. Raises UserError naming the line: not an object with
    "path", "part" and "reply", a path that the view does not have, an unknown part, a part twice.
    """
    if form not in BOX_FORMATS:
        raise UserError(f"boxes={form}: choose {', '.join(BOX_FORMATS)}")
    rows = {view.path(row): row for row in range(len(view))}
    found: dict[str, dict[str, list[Sequence[float]]]] = {
        d: {part: [] for part in PARTS} for d in view.digests(range(len(view)))
    }
    seen, unread = set(), 0
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        path, part, reply = _fields(line, f"{place} line {number}")
        if path not in rows:
            raise UserError(f"{place} line {number}: the table has no image {path!r} in this split")
        if part not in PARTS or (path, part) in seen:
            raise UserError(f"{place} line {number}: part {part!r} of {path}: expected each of {', '.join(PARTS)} once")
        seen.add((path, part))
        row = rows[path]
        boxes = parse_boxes(reply, form, (int(view.height[row]), int(view.width[row])))
        unread += not boxes
        found[view.digests([row])[0]][part] = [list(box) for box in boxes]
    return found, unread


def _fields(line: str, where: str) -> tuple[str, str, str]:
    try:
        fields = json.loads(line)
        values = [fields[name] for name in FIELDS]
    except (ValueError, KeyError, TypeError):
        values = [None]
    if not all(isinstance(value, str) for value in values):
        raise UserError(f'{where}: expected an object with "path", "part" and "reply", all text')
    return values[0], values[1], values[2]
