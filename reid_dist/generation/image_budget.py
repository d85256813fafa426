"""How many pixels, and so how many tokens, a Qwen-VL model sees of an image.

The library's rule (methods/icl.md section 6): both sides become multiples of `factor` (patch x merge), the aspect is kept
roughly, the area lies between the two budgets. With both at 50 176 pixels a person crop gives 52 to 72 tokens.
"""

from __future__ import annotations

import math

FACTOR = 28
PIXELS = 50_176  # 64 tokens of 28 x 28
LARGEST_ASPECT = 200


def seen_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) after the resize. Raises ValueError for an empty image or an aspect above 200."""
    if min(height, width) < 1:
        raise ValueError(f"an image of {height} x {width} pixels is empty")
    if max(height, width) > LARGEST_ASPECT * min(height, width):
        raise ValueError(
            f"an image of {height} x {width} pixels: the longer side is over {LARGEST_ASPECT} times the other"
        )
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def visual_tokens(height: int, width: int, factor: int = FACTOR, pixels: int = PIXELS) -> int:
    """Tokens that an image costs at min = max = `pixels`."""
    rows, columns = seen_size(height, width, factor, pixels, pixels)
    return rows * columns // factor**2
