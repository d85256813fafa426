"""Decode an image once, to RGB uint8, or say which file cannot be (datasets specification, section 0 rule 6).

Grayscale and palette images become RGB, CMYK is converted, an alpha channel is dropped, 16-bit grey is cut to its upper
8 bits. The EXIF orientation is applied, so that height and width are those a viewer shows. Truncated files are refused:
Pillow's LOAD_TRUNCATED_IMAGES, which would fill them with grey, is never set. A file whose content is another format
than its name says (a PNG called .jpg, common in these datasets) is accepted; the pack job counts them.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from reid_dist.data.records import DatasetError

# Formats that run code or fetch files (EPS, ...) are never tried.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
# (MPO is what some cameras write for a JPEG; the JPEG reader knows it.)
_EXTENSIONS = {"JPEG": ("jpg", "jpeg"), "MPO": ("jpg", "jpeg"), "TIFF": ("tif", "tiff")}
_ORIENTATION = 0x0112


class DecodeError(DatasetError):
    """A file that is no whole image; the message names it."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What decoding found: size as shown (after the EXIF rotation) and whether name and content disagree."""

    height: int
    width: int
    misnamed: bool


def decode(data: bytes, name: str) -> np.ndarray:
    """uint8 [height, width, 3] of an encoded image. `name` is the file's, for the message. Raises DecodeError."""
    return np.array(_load(data, name)[0])  # a copy, so that the caller may draw on it


def inspect(data: bytes, name: str) -> ImageFacts:
    """Decode completely (so that damage anywhere is found) and return size and format facts. Raises DecodeError."""
    image, kind = _load(data, name)
    extension = name.rpartition(".")[2].lower()
    return ImageFacts(image.height, image.width, extension not in _EXTENSIONS.get(kind, (kind.lower(),)))


def _load(data: bytes, name: str) -> tuple[Image.Image, str]:
    if not data:
        raise DecodeError(f"{name}: the file is empty (0 bytes); fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                kind = str(opened.format)
                opened.load()
                return _to_rgb(opened), kind
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, struct.error, ...
        reason = " ".join(str(error).split()).replace("<_io.BytesIO object at ", "<")[:120] or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "not an image of a known format"
        raise DecodeError(f"{name}: cannot be decoded: {reason}; fetch it again or use on_error=quarantine") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about anything else
    return image.convert("RGB")
