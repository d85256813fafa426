"""A tracklet as one picture: frames spread evenly over it, side by side."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from reid_dist.data.store import TableView
from reid_dist.data.tracklets import tracklets_of

FRAMES = 6
HEIGHT = 128  # pixels of every frame


def film_strips(view: TableView, rows: np.ndarray) -> list[bytes]:
    """Encoded PNG of the tracklet of each of `rows`; shorter tracklets show all of their frames."""
    chosen = [
        members[np.unique(np.linspace(0, len(members) - 1, FRAMES).round().astype(int))]
        for members in tracklets_of(view, rows)
    ]
    images = iter(view.images(np.concatenate(chosen)))
    return [_strip([Image.fromarray(next(images)) for _ in frames]) for frames in chosen]


def _strip(frames: list[Image.Image]) -> bytes:
    sized = [frame.resize((max(1, round(frame.width * HEIGHT / frame.height)), HEIGHT)) for frame in frames]
    strip = Image.new("RGB", (sum(frame.width for frame in sized) + 2 * (len(sized) - 1), HEIGHT), "white")
    left = 0
    for frame in sized:
        strip.paste(frame, (left, 0))
        left += frame.width + 2
    buffer = io.BytesIO()
    strip.save(buffer, format="PNG")
    return buffer.getvalue()
