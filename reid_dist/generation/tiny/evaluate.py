"""How well the small model answers, on pictures of people it never learned from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from reid_dist.data.synthetic.identity import ATTRIBUTES
from reid_dist.data.synthetic.words import SLOTS
from reid_dist.generation.tiny.lessons import Teacher
from reid_dist.generation.tiny.questions import HIDDEN, NO, PARTS, YES, words_of
from reid_dist.generation.tiny.samples import UNCLEAR, Pictures
from reid_dist.generation.tiny.towers import pack, say, see


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, test: Pictures) -> dict[str, Any]:
    """Accuracy on pictures of people never learned from: per attribute where the picture shows it, "hidden" over all
    attributes of which no pixel is seen, match questions by number of phrases, boxes' IoU.
    """
    teacher = Teacher(test, tokenizer, np.random.default_rng(1))
    right: dict[str, list[bool]] = {}
    overlaps: list[float] = []
    for start in range(0, len(test), 50):
        rows = range(start, min(start + 50, len(test)))
        lessons = []
        kinds: list[list[str]] = []
        for row in rows:
            asked = [(kind, teacher.attribute(row, name)) for name in ATTRIBUTES if (kind := _kind(test, row, name))]
            asked += [(f"match{count}", teacher.match(row, count)[0]) for count in (1, 2, 3, len(SLOTS))]
            asked += [("box", lesson) for part in range(len(PARTS)) if (lesson := teacher.ground(row, part))]
            lessons.append([lesson for _, lesson in asked])
            kinds.append([kind for kind, _ in asked])
        packed = pack(lessons, model.config.text_config.pad_token_id)
        seen = see(model.model.visual, torch.from_numpy(test.pixels[start : start + 50]).to(model.device))
        logits = say(model, seen, packed)
        _score(logits.argmax(2).cpu(), packed, kinds, tokenizer, right, overlaps)
    attributes = {name: float(np.mean(right[name])) for name in ATTRIBUTES}
    matches = {f"match{count}": float(np.mean(right[f"match{count}"])) for count in (1, 2, 3, len(SLOTS))}
    matches["match"] = float(
        np.mean([*right["match1"], *right["match2"], *right["match3"], *right[f"match{len(SLOTS)}"]])
    )
    hidden = {"hidden": float(np.mean(right["hidden"]))}
    rounded = {name: round(value, 4) for name, value in (attributes | hidden | matches).items()}
    return {
        **rounded,
        "lowest_attribute": min(rounded[n] for n in ATTRIBUTES),
        "box_iou": round(float(np.mean(overlaps)), 4),
    }


def _kind(pictures: Pictures, row: int, name: str) -> str:
    """The attribute's name where the picture shows it (or that its thing is not there), "hidden" where no pixel does, ""
    in between.
    """
    answer = pictures.answers[row, list(ATTRIBUTES).index(name)]
    if answer == UNCLEAR:
        return ""
    return HIDDEN if list(words_of(name))[answer] == HIDDEN else name


def _score(
    said: Tensor,
    packed: Any,
    kinds: list[list[str]],
    tokenizer: Any,
    right: dict[str, list[bool]],
    overlaps: list[float],
) -> None:
    """Compare what is said at the last question token (attributes, matches) or at four places (boxes, each given the
    true numbers before it).
    """
    verdicts = {tokenizer.encode(word)[0] for word in (YES, NO)}
    for b, names in enumerate(kinds):
        for number, kind in enumerate(names, start=1):
            places = torch.nonzero((packed.segment[b] == number) & (packed.targets[b] >= 0)).flatten()[:-1]
            if kind == "box":
                pair = [[int(tokenizer.decode([int(v)])) if tokenizer.decode([int(v)]).strip().isdigit() else 0 for v in row]
                        for row in (said[b, places], packed.targets[b, places])]  # fmt: skip
                overlaps.append(_iou(*pair))
                continue
            last = places[-1]
            assert not kind.startswith("match") or int(packed.targets[b, last]) in verdicts
            right.setdefault(kind, []).append(bool(said[b, last] == packed.targets[b, last]))


def _iou(one: list[int], other: list[int]) -> float:
    def area(box: list[int]) -> int:
        return max(0, box[2] - box[0]) * max(0, box[3] - box[1])

    low = [max(a, b) for a, b in zip(one[:2], other[:2], strict=True)]
    high = [min(a, b) for a, b in zip(one[2:], other[2:], strict=True)]
    both = area([*low, *high])
    return both / max(1, area(one) + area(other) - both)
