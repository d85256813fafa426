"""Pictures to learn from: several synthetic worlds, so that cameras and places are many, and their truths as arrays."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from reid_dist.data.synthetic import World
from reid_dist.data.synthetic.identity import ATTRIBUTES, OWNER, Attributes
from reid_dist.data.synthetic.render import Drawing
from reid_dist.generation.tiny.questions import BINS, PARTS, attribute_answer, part_boxes, words_of

SIDE = (96, 48)  # height, width as the model sees every picture
GROUPS = (("head",), ("torso", "arm"), ("leg", "foot"))
UNCLEAR = -1


@dataclass(frozen=True, eq=False)
class Pictures:
    """N pictures. `pixels` uint8 [N, *SIDE, 3]; `answers` int64 [N, attributes] (index into words_of; UNCLEAR where
    some pixels show it, but fewer than a caption may speak of: nothing is asked then); `boxes` int64 [N, 3, 4] in 32nds,
    -1 where a part is not seen.
    """

    pixels: np.ndarray
    answers: np.ndarray
    boxes: np.ndarray
    wear: tuple[Attributes, ...]
    visible: tuple[frozenset[str], ...]

    def __len__(self) -> int:
        return len(self.wear)


def worlds(seeds: Sequence[int], people: int, split: str, images: int) -> Iterator[tuple[World, str]]:
    """Worlds of `people` identities in `split`, every other one with strong changes between cameras."""
    for place, seed in enumerate(seeds):
        yield World(
            seed=seed, domain="small-mllm", difficulty="strong" if place % 4 == 3 else "mild", images_per_id=images,
            num_train=people if split == "train" else 0, num_val=0, num_test=people if split == "test" else 0,
        ), split  # fmt: skip


def draw_pictures(seeds: Sequence[int], people: int, split: str, images: int, processes: int = 1) -> Pictures:
    """`people` identities x `images` pictures of each seed's world, the same for any number of processes."""
    todo = list(worlds(seeds, people, split, images))
    if processes == 1:
        drawn = [_draw_world(*one) for one in todo]
    else:
        with get_context("spawn").Pool(processes) as pool:
            drawn = pool.starmap(_draw_world, todo, chunksize=1)
    rows = [row for of_world in drawn for row in of_world]
    pixels, answers, boxes, wear, visible = zip(*rows, strict=True)
    return Pictures(np.stack(pixels), np.stack(answers), np.stack(boxes), wear, visible)


def _draw_world(world: World, part: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, Attributes, frozenset[str]]]:
    """Per picture of a world pixels, answers, boxes, attributes, what is visible."""
    rows = []
    for person in world.people[part]:
        for camera, frame in world.shots(person):
            encoded, drawing = world.picture(person, camera, frame)
            seen = drawing.visible()
            answers = _answers(person.attributes, seen, drawing.cue_pixels())
            rows.append((seen_pixels(encoded), answers, _boxes(drawing), person.attributes, seen))
    return rows


def seen_pixels(encoded: bytes) -> np.ndarray:
    """uint8 [*SIDE, 3]: the picture as the processor resizes it."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB").resize((SIDE[1], SIDE[0]), Image.Resampling.BICUBIC))


def _answers(wear: Attributes, seen: frozenset[str], pixels: Mapping[str, float]) -> np.ndarray:
    found = np.full(len(ATTRIBUTES), UNCLEAR, np.int64)
    for place, name in enumerate(ATTRIBUTES):
        shown_by = name if name in wear else OWNER[name]
        if shown_by in seen or pixels[shown_by] == 0:
            found[place] = list(words_of(name).values()).index(attribute_answer(name, wear, seen))
    return found


def _boxes(drawing: Drawing) -> np.ndarray:
    names = [name for group in GROUPS for name in group]
    areas = drawing.parts(names)
    starts = np.cumsum([0, *(len(group) for group in GROUPS)])[:-1]
    found = part_boxes(np.add.reduceat(areas, starts, axis=0))
    rows = [[-1] * 4 if (box := found[part]) is None else [round(v * BINS) for v in box] for part in PARTS]
    return np.array(rows, np.int64)
