"""A truthful answerer over the attribute record: the scripted stand-in for a multimodal model.

The dialogues of caption enrichment and of interactive retrieval (datasets specification 8.2; ICL, RDA and THI) ask
about one picture: does it show this pedestrian, what is the colour of the upper garment. Here the answers follow from
the record and from what the picture shows, so such a dialogue can be tested to the letter without a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from reid_dist.data.synthetic.identity import ATTRIBUTES, Attributes
from reid_dist.data.synthetic.words import phrase, read_phrases, slot_attributes

NOT_VISIBLE = "not visible"
# First match wins: the words of a question, the slot it is about, the attributes when it asks for one thing.
_TOPICS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"hair", "hair", ()),
    (r"hat|cap|headwear|beanie", "hat", ()),
    (r"bag|backpack|rucksack|luggage|carr(?:y|ies)|hold", "bag", ()),
    (r"shoes?|feet|footwear", "shoes", ()),
    (r"sleeves?", "upper", ("sleeve",)),
    (r"patterns?|stripes|logo", "upper", ("pattern",)),
    (r"upper[- ]body|upper|top|shirt|jacket|coat|hoodie", "upper", ()),
    (r"lower[- ]body|lower|trousers|pants|skirt|legs?|shorts", "lower", ()),
)
_NARROW = ((r"colou?rs?", "_colour"), (r"length|long|short", "_length"), (r"types?|kinds?", "_type"))


def answer(wear: Attributes, question: str, visible: Collection[str] | None = None) -> str:
    """One short true sentence, or "not visible" when the picture does not show it or the world has no such thing.

    A question about colour, length or kind of a garment is answered by that alone; otherwise by all that is known of
    it.
    """
    text = question.lower()
    for words, slot, attributes in _TOPICS:
        if re.search(rf"\b(?:{words})\b", text):
            wanted = attributes or _narrowed(text, slot_attributes(slot), wear)
            seen = [name for name in wanted if visible is None or name in visible]
            said = phrase(slot, wear, seen, np.random.Generator(np.random.Philox(0)))
            return f"The person has {said}." if said else NOT_VISIBLE
    return NOT_VISIBLE


def _narrowed(text: str, attributes: tuple[str, ...], wear: Attributes) -> tuple[str, ...]:
    wanted = {ending for words, ending in _NARROW if re.search(rf"\b(?:{words})\b", text)}
    chosen = tuple(name for name in attributes if name in wear and any(name.endswith(ending) for ending in wanted))
    return chosen or attributes


def shows(wear: Attributes, description: str, visible: Collection[str] | None = None) -> bool:
    """Whether the picture can be of the pedestrian that a caption of this world describes.

    True when nothing that the description states contradicts what the picture shows.
    """
    stated = read_phrases(description)
    return all(wear.get(n) == v for n, v in stated.items() if n in ATTRIBUTES and (visible is None or n in visible))
