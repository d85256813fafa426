"""A picture as a model is given it: decoded once, however many questions are asked about it."""

from __future__ import annotations

import functools

from PIL import Image

from reid_dist.data.decode import DecodeError, decode
from reid_dist.generation.messages import BadInput

LEAST_SIDE = 8  # pixels
KEPT = 64  # decoded pictures in a worker: the questions about one come close together


@functools.lru_cache(maxsize=KEPT)
def open_picture(data: bytes) -> Image.Image:
    """RGB, upright. Raises BadInput for bytes that are no whole picture, or a side under 8 pixels."""
    try:
        picture = Image.fromarray(decode(data, "the image"))
    except DecodeError as error:
        raise BadInput(str(error).partition(";")[0].replace("the image: ", "the image ", 1)) from None
    if min(picture.size) < LEAST_SIDE:
        raise BadInput(f"the image has {picture.height} x {picture.width} pixels; {LEAST_SIDE} each way are needed")
    return picture
