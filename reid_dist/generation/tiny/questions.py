"""What the small model is asked and how it answers: closed vocabularies over the synthetic world's attributes.

    hair colour:                                              -> black | brown | ... | hidden | none
    does this person match hair colour: black, hat: none ?    -> yes | no
    where is head ?                                           -> left top right bottom in 32nds of the image

A match question states attributes in the words in which they are asked; free captions of this world are first read into
attributes (data/synthetic/words.read_phrases), so wording is no part of what the model must know.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np

from reid_dist.data.synthetic.identity import ABSENT, ATTRIBUTES, OWNER
from reid_dist.data.synthetic.words import SLOTS, phrase, read_phrases, slot_attributes

HIDDEN = "hidden"  # the picture does not show it
YES, NO = "yes", "no"
BINS = 32
PARTS = ("head", "upper", "legs")
MATCH = "does this person match"


def words_of(attribute: str) -> dict[str, str]:
    """value -> the one word that answers; with "hidden", and "none" for the colour of a thing that is not there."""
    words = {value: value.split()[0] for value in ATTRIBUTES[attribute]}
    return {**words, **({ABSENT: ABSENT} if attribute in OWNER else {}), HIDDEN: HIDDEN}


def attribute_question(attribute: str) -> str:
    """The question about one attribute."""
    return f"{attribute.replace('_', ' ')}:"


def attribute_answer(attribute: str, wear: Mapping[str, str], visible: Iterable[str]) -> str:
    """The true answer about one picture."""
    if attribute not in wear:  # the thing it belongs to is absent: that shows where the thing would
        return ABSENT if OWNER[attribute] in visible else HIDDEN
    return words_of(attribute)[wear[attribute]] if attribute in visible else HIDDEN


def read_attribute(attribute: str, answer: str) -> str | None:
    """The value that an answer names; None for hidden, absent and unknown words."""
    back = {word: value for value, word in words_of(attribute).items()}
    value = back.get(answer.strip())
    if value == HIDDEN or (value == ABSENT and attribute in OWNER):
        return None
    return value


def statements(stated: Mapping[str, str], slots: Iterable[str] = tuple(SLOTS)) -> list[str]:
    """The attributes that a match question states, in its order."""
    return [name for slot in slots for name in slot_attributes(slot) if name in stated]


def match_question(stated: Mapping[str, str], slots: Iterable[str] = tuple(SLOTS)) -> str:
    """The question whether the picture shows all that is stated; "" when nothing is."""
    said = [f"{attribute_question(name)} {words_of(name)[stated[name]]}" for name in statements(stated, slots)]
    return f"{MATCH} {', '.join(said)} ?" if said else ""


def ground_question(part: str) -> str:
    """The question for a part's box."""
    return f"where is {part} ?"


def ground_answer(box: Iterable[float]) -> str:
    """A box in fractions as four numbers of two digits, in 32nds."""
    return " ".join(f"{min(max(round(value * BINS), 0), BINS):02d}" for value in box)


def part_boxes(areas: np.ndarray) -> dict[str, tuple[float, float, float, float] | None]:
    """Boxes in fractions around the pixels of each part; None where a part is not seen.

    areas float [3, H, W]: share of each pixel that belongs to head, upper body, legs.
    """
    found: dict[str, tuple[float, float, float, float] | None] = {}
    for part, area in zip(PARTS, areas, strict=True):
        rows, columns = np.flatnonzero((area > 0.5).any(axis=1)), np.flatnonzero((area > 0.5).any(axis=0))
        height, width = area.shape
        found[part] = None
        if len(rows):
            found[part] = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return found


# ---- rules that stand in for merge, split and paraphrase, which a model of this size cannot do


def sentence(slot: str, seen: Mapping[str, str]) -> str:
    """One sentence on a slot in the world's own words; "" when nothing is known of it."""
    return _sentence(slot, tuple(sorted(seen.items())))


@functools.lru_cache(maxsize=4096)
def _sentence(slot: str, seen: tuple[tuple[str, str], ...]) -> str:
    wear = dict(seen)
    said = phrase(slot, wear, wear, np.random.Generator(np.random.Philox(0)))
    return f"The person has {said}." if said else ""


def merged(caption: str, observed: Mapping[str, str]) -> str:
    """The caption, then what was observed and it does not speak of; where both speak, the caption stands."""
    stated = read_phrases(caption)
    new = {name: value for name, value in observed.items() if name not in stated}
    for name, thing in OWNER.items():  # no colour for a thing that the caption says is absent
        if stated.get(thing) == ABSENT or (stated.get(thing) and stated[thing] != observed.get(thing)):
            new.pop(name, None)
    extra = [said for slot in SLOTS if (said := sentence(slot, {n: new[n] for n in slot_attributes(slot) if n in new}))]
    return " ".join([caption.strip(), *extra])


def pieces(text: str) -> list[str]:
    """One sentence per slot that a text speaks of."""
    stated = read_phrases(text)
    slots = ({name: stated[name] for name in slot_attributes(slot) if name in stated} for slot in SLOTS)
    return [said for slot, part in zip(SLOTS, slots, strict=True) if (said := sentence(slot, part))]


_FRAMES = ("There is a person with {}.", "One can see {} on the person.", "The pedestrian has {}.", "The walker wears {}.",
           "What one notices is {}.")  # fmt: skip


def rewordings(text: str, count: int) -> list[str]:
    """Up to `count` other wordings of a sentence of `pieces`, with the world's synonyms."""
    stated = read_phrases(text)
    slot = next((slot for slot in SLOTS if set(slot_attributes(slot)) & set(stated)), None)
    if slot is None:
        return []
    found = []
    for number in range(count):
        said = phrase(slot, stated, stated, np.random.Generator(np.random.Philox(number + 1)))
        found.append(_FRAMES[number % len(_FRAMES)].format(said))
    return list(dict.fromkeys(found))
