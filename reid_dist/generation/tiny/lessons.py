"""Questions with their answers, drawn for a batch of pictures, as token ids and targets.

In a match question the model says at every colon what the picture shows, at the stated word whether that fits, and at the
question mark whether all fits: a signal per statement instead of one per question. What it says at the colon it learns from the
questions about attributes as well; comparing it with the next word is then one step of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from reid_dist.data.synthetic.identity import ABSENT, ATTRIBUTES, OWNER
from reid_dist.data.synthetic.words import SLOTS, slot_attributes
from reid_dist.generation.tiny.model import END
from reid_dist.generation.tiny.questions import (
    BINS,
    HIDDEN,
    NO,
    PARTS,
    YES,
    attribute_question,
    ground_question,
    match_question,
    statements,
    words_of,
)
from reid_dist.generation.tiny.samples import UNCLEAR, Pictures

Lesson = tuple[list[int], list[int]]  # ids, targets (-100: nothing to learn)
PHRASES = (0.25, 0.25, 0.2, 0.1, 0.1, 0.1)  # share of match questions with 1 ... 6 phrases
EASY_PHRASES = (0.7, 0.3, 0, 0, 0, 0)  # while comparing is learned
MENTION, EASY_MENTION = 0.85, 0.4  # share of a slot's attributes that a phrase states


class Teacher:
    """Draws lessons; all draws come from one generator."""

    def __init__(self, pictures: Pictures, tokenizer: Any, rng: np.random.Generator) -> None:
        self.pictures, self.tokenizer, self.rng = pictures, tokenizer, rng
        self.end = tokenizer.convert_tokens_to_ids(END)
        self.colon = tokenizer.encode(attribute_question("hat"))[-1]
        self._ids: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids, remembered for short texts."""
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text)
        return self._ids[text]

    def _lesson(self, question: list[int], answer: list[int]) -> Lesson:
        ids = [*question, *answer]
        return ids, [-100] * (len(question) - 1) + [*answer, self.end]

    def attribute(self, picture: int, name: str) -> Lesson:
        """One attribute of one picture."""
        return self._lesson(self.ids(attribute_question(name)), [self._answer(picture, name)])

    def _answer(self, picture: int, name: str) -> int:
        """The token that truly answers."""
        word = list(words_of(name).values())[self.pictures.answers[picture, list(ATTRIBUTES).index(name)]]
        return self.ids(word)[0]

    def ground(self, picture: int, part: int, mirrored: bool = False) -> Lesson | None:
        """One part's box; None where it is not seen."""
        box = self.pictures.boxes[picture, part]
        if box[0] < 0:
            return None
        box = mirror(box) if mirrored else box
        words = [token for value in box for token in self.ids(f"{value:02d}")]
        return self._lesson(self.ids(ground_question(PARTS[part])), words)

    def match(self, picture: int, phrases: int | None = None, easy: bool = False) -> tuple[Lesson, bool]:
        """A match question, true or false with equal chance, and which it is. `easy`: few phrases that state little."""
        wear, seen = self.pictures.wear[picture], self.pictures.visible[picture]
        shares, mention = (EASY_PHRASES, EASY_MENTION) if easy else (PHRASES, MENTION)
        count = phrases or 1 + int(self.rng.choice(len(shares), p=shares))
        slots = [str(slot) for slot in self.rng.permutation(list(SLOTS))[:count]]
        unclear = self.unclear(picture)
        stated = {
            name: wear[name] for slot in slots for name in slot_attributes(slot)
            if name in wear and name not in unclear and self.rng.random() < mention
        }  # fmt: skip
        if self.rng.random() < 0.5:
            stated = self._falsified(stated, seen, slots, unclear)
        names = statements(stated, slots)
        if not names:
            return self.match(picture, phrases, easy)
        question = self.ids(match_question(stated, slots))
        targets, fits = [-100] * len(question), []
        verdict, hidden = [self.ids(NO)[0], self.ids(YES)[0]], self.ids(HIDDEN)[0]
        colons = [place for place, token in enumerate(question) if token == self.colon]
        for place, name in zip(colons, names, strict=True):
            truth = self._answer(picture, name)
            fits.append(truth in (question[place + 1], hidden))
            targets[place], targets[place + 1] = truth, verdict[fits[-1]]
        answer = verdict[all(fits)]
        targets[-1] = answer
        return ([*question, answer], [*targets, self.end]), all(fits)

    def unclear(self, picture: int) -> set[str]:
        """Attributes that are neither legible on the picture nor surely hidden."""
        return {n for n, answer in zip(ATTRIBUTES, self.pictures.answers[picture], strict=True) if answer == UNCLEAR}

    def _falsified(
        self, stated: Mapping[str, str], seen: frozenset[str], slots: list[str], unclear: set[str]
    ) -> dict[str, str]:
        """One or two visible attributes replaced, as between confusers; or one slot of somebody else."""
        changed = dict(stated)
        candidates = [name for name in stated if name in seen]
        if not candidates:
            return changed
        if self.rng.random() < 0.3:
            other = self.pictures.wear[int(self.rng.integers(len(self.pictures)))]
            slot = str(self.rng.choice(slots))
            names = [name for name in slot_attributes(slot) if name not in unclear]
            changed = {n: v for n, v in changed.items() if n not in slot_attributes(slot)}
            return {**changed, **{n: other[n] for n in names if n in other}}
        for name in self.rng.permutation(candidates)[: 1 + int(self.rng.integers(2))]:
            values = [value for value in ATTRIBUTES[name] if value != stated[name]]
            changed[str(name)] = str(self.rng.choice(values))
        for name, thing in OWNER.items():  # a thing that is now absent has no colour
            if changed.get(thing) == ABSENT:
                changed.pop(name, None)
        return changed

    def draw(self, picture: int, mirrored: bool, counts: tuple[int, int, int], easy: bool) -> list[Lesson]:
        """Lessons about one picture for one step; `counts`: of attributes, match questions, boxes."""
        unclear = self.unclear(picture)
        names = [str(name) for name in self.rng.permutation(list(ATTRIBUTES)) if name not in unclear]
        found = [self.attribute(picture, name) for name in names[: counts[0]]]
        found += [self.match(picture, easy=easy)[0] for _ in range(counts[1])]
        boxes = [self.ground(picture, int(part), mirrored) for part in self.rng.permutation(len(PARTS))[: counts[2]]]
        return found + [lesson for lesson in boxes if lesson is not None]


def mirror(boxes: np.ndarray) -> np.ndarray:
    """Boxes [..., 4] of the mirrored picture; -1 stays."""
    turned = np.stack([BINS - boxes[..., 2], boxes[..., 1], BINS - boxes[..., 0], boxes[..., 3]], axis=-1)
    return np.where(boxes < 0, boxes, turned)
