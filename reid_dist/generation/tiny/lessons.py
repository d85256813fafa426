"""Questions with their answers, drawn for a batch of pictures, as token ids and targets.

In a match question the model says yes or no at every comma (does the phrase before it fit?) and at the question mark (do
all fit?): one signal per phrase instead of one per question, without which matching is not learned in minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from reid_dist.data.synthetic.identity import ABSENT, ATTRIBUTES, OWNER
from reid_dist.data.synthetic.words import SLOTS, slot_attributes
from reid_dist.generation.tiny.model import END
from reid_dist.generation.tiny.questions import (
    NO,
    PARTS,
    YES,
    attribute_question,
    contradicted,
    ground_question,
    match_question,
    slot_phrase,
    words_of,
)
from reid_dist.generation.tiny.samples import Pictures

Lesson = tuple[list[int], list[int]]  # ids, targets (-100: nothing to learn)
PHRASES = (0.25, 0.25, 0.2, 0.1, 0.1, 0.1)  # share of match questions with 1 ... 6 phrases
MENTION = 0.85


class Teacher:
    """Draws lessons; all draws come from one generator."""

    def __init__(self, pictures: Pictures, tokenizer: Any, rng: np.random.Generator) -> None:
        self.pictures, self.tokenizer, self.rng = pictures, tokenizer, rng
        self.end = tokenizer.convert_tokens_to_ids(END)
        self.comma = tokenizer.encode("x,")[-1]
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
        word = list(words_of(name).values())[self.pictures.answers[picture, list(ATTRIBUTES).index(name)]]
        return self._lesson(self.ids(attribute_question(name)), self.ids(word))

    def ground(self, picture: int, part: int) -> Lesson | None:
        """One part's box; None where it is not seen."""
        box = self.pictures.boxes[picture, part]
        if box[0] < 0:
            return None
        words = [token for value in box for token in self.ids(f"{value:02d}")]
        return self._lesson(self.ids(ground_question(PARTS[part])), words)

    def match(self, picture: int, phrases: int | None = None) -> tuple[Lesson, bool]:
        """A match question, true or false with equal chance, and which it is."""
        wear, seen = self.pictures.wear[picture], self.pictures.visible[picture]
        count = phrases or 1 + int(self.rng.choice(len(PHRASES), p=PHRASES))
        slots = [str(slot) for slot in self.rng.permutation(list(SLOTS))[:count]]
        stated = {
            name: wear[name] for slot in slots for name in slot_attributes(slot)
            if name in wear and self.rng.random() < MENTION
        }  # fmt: skip
        if self.rng.random() < 0.5:
            stated = self._falsified(stated, seen, slots)
        slots = [slot for slot in slots if slot_phrase(slot, stated)]
        if not slots:
            return self.match(picture, phrases)
        fits = [not contradicted(slot, stated, wear, seen) for slot in slots]
        question = self.ids(match_question(stated, slots))
        targets, phrase = [-100] * len(question), 0
        verdict = [self.ids(NO)[0], self.ids(YES)[0]]
        for place, token in enumerate(question):
            if token == self.comma:
                targets[place], phrase = verdict[fits[phrase]], phrase + 1
        answer = verdict[all(fits)]
        targets[-1] = answer
        return ([*question, answer], [*targets, self.end]), all(fits)

    def _falsified(self, stated: Mapping[str, str], seen: frozenset[str], slots: list[str]) -> dict[str, str]:
        """One or two visible attributes replaced, as between confusers; or one slot of somebody else."""
        changed = dict(stated)
        candidates = [name for name in stated if name in seen]
        if not candidates:
            return changed
        if self.rng.random() < 0.3:
            other = self.pictures.wear[int(self.rng.integers(len(self.pictures)))]
            slot = str(self.rng.choice(slots))
            names = slot_attributes(slot)
            changed = {n: v for n, v in changed.items() if n not in names}
            return {**changed, **{n: other[n] for n in names if n in other}}
        for name in self.rng.permutation(candidates)[: 1 + int(self.rng.integers(2))]:
            values = [value for value in ATTRIBUTES[name] if value != stated[name]]
            changed[str(name)] = str(self.rng.choice(values))
        for name, thing in OWNER.items():  # a thing that is now absent has no colour
            if changed.get(thing) == ABSENT:
                changed.pop(name, None)
        return changed

    def draw(self, picture: int, attributes: int, matches: int, grounds: int) -> list[Lesson]:
        """Lessons about one picture for one step."""
        names = self.rng.permutation(list(ATTRIBUTES))[:attributes]
        found = [self.attribute(picture, str(name)) for name in names]
        found += [self.match(picture)[0] for _ in range(matches)]
        boxes = [self.ground(picture, int(part)) for part in self.rng.permutation(len(PARTS))[:grounds]]
        return found + [lesson for lesson in boxes if lesson is not None]
