"""Words for attributes: noun phrases of one slot of the figure, written and read back.

A slot (hair, hat, upper, lower, bag, shoes) is a head noun with adjectives before it; an attribute that is not
mentioned leaves its adjective out, or a general noun ("top", "bag") in the place of the kind. Every word belongs to
one value within its slot, so `read_phrases` recovers exactly what `phrase` was told to mention.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from reid_dist.data.synthetic.identity import ABSENT, ATTRIBUTES, Attributes

_COLOUR = {
    "grey": ("grey", "gray"),
    "purple": ("purple", "violet"),
    "blond": ("blond", "fair"),
    "red": ("red", "crimson"),
}
_ADJECTIVE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hair_length": {"short": ("short", "cropped"), "long": ("long", "flowing")},
    "sleeve": {"short": ("short-sleeved", "half-sleeved"), "long": ("long-sleeved", "full-sleeved")},
    "pattern": {
        "plain": ("plain", "single-coloured"),
        "striped": ("striped", "stripy"),
        "checked": ("checked", "plaid"),
        "printed": ("printed", "logo-bearing"),
    },
    "lower_length": {"short": ("short", "knee-length"), "long": ("long", "ankle-length")},
    **{
        name: {value: _COLOUR.get(value, (value,)) for value in values}
        for name, values in ATTRIBUTES.items()
        if name.endswith("colour")
    },
}
_NOUN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hat": {
        "cap": ("cap", "baseball cap"),
        "beanie": ("beanie", "knitted hat"),
        ABSENT: ("no hat", "an uncovered head"),
    },
    "upper_type": {
        "shirt": ("shirt", "t-shirt"),
        "hoodie": ("hoodie", "hooded sweatshirt"),
        "jacket": ("jacket", "open jacket"),
        "coat": ("coat", "overcoat"),
    },
    "lower_type": {"trousers": ("trousers", "pants"), "skirt": ("skirt",)},
    "bag": {
        "backpack": ("backpack", "rucksack"),
        "shoulder bag": ("shoulder bag", "crossbody bag"),
        "handbag": ("handbag", "hand-held bag"),
        ABSENT: ("no bag", "no luggage"),
    },
}
# Slot: (attributes that are adjectives, in writing order; attribute that is the noun; nouns when it is not mentioned).
SLOTS: Mapping[str, tuple[tuple[str, ...], str | None, tuple[str, ...]]] = {
    "hair": (("hair_length", "hair_colour"), None, ("hair",)),
    "hat": (("hat_colour",), "hat", ("headwear",)),
    "upper": (("sleeve", "upper_colour", "pattern"), "upper_type", ("top", "upper garment")),
    "lower": (("lower_length", "lower_colour"), "lower_type", ("bottoms", "legwear")),
    "bag": (("bag_colour",), "bag", ("bag", "piece of luggage")),
    "shoes": (("shoe_colour",), None, ("shoes", "footwear")),
}
_SHORTS = "shorts"  # one word for lower_type=trousers with lower_length=short
_NO_ARTICLE = {"hair", "headwear", "bottoms", "legwear", "trousers", "pants", "shoes", "footwear", _SHORTS}


def slot_attributes(slot: str) -> tuple[str, ...]:
    """All attributes of a slot."""
    adjectives, noun, _ = SLOTS[slot]
    return adjectives + ((noun,) if noun else ())


def phrase(slot: str, wear: Attributes, mention: Collection[str], rng: np.random.Generator) -> str | None:
    """A noun phrase that states exactly the attributes of `slot` that are in `mention`; None when there is nothing to
    say.
    """
    adjectives, noun, general = SLOTS[slot]
    said = [name for name in slot_attributes(slot) if name in mention and name in wear]
    if not said:
        return None
    nouns = _NOUN[noun][wear[noun]] if noun in said else general
    head = str(rng.choice(nouns))
    if noun in said and wear[noun] == ABSENT:
        return head
    words = [str(rng.choice(_ADJECTIVE[name][wear[name]])) for name in adjectives if name in said]
    short_trousers = slot == "lower" and (wear.get("lower_type"), wear.get("lower_length")) == ("trousers", "short")
    if short_trousers and {"lower_type", "lower_length"} <= set(said) and rng.random() < 0.5:
        head, words = _SHORTS, words[1:]
    text = " ".join([*words, head])
    if head in _NO_ARTICLE:
        return text
    return ("an " if text[0] in "aeiou" else "a ") + text


def _readers() -> tuple[re.Pattern[str], dict[str, tuple[str, dict[str, str]]], dict[str, dict[str, tuple[str, str]]]]:
    nouns: dict[str, tuple[str, dict[str, str]]] = {
        _SHORTS: ("lower", {"lower_type": "trousers", "lower_length": "short"})
    }
    adjectives: dict[str, dict[str, tuple[str, str]]] = {}
    for slot, (names, noun, general) in SLOTS.items():
        nouns.update({word: (slot, {}) for word in general})
        for value, words in _NOUN.get(noun or "", {}).items():
            nouns.update({word: (slot, {str(noun): value}) for word in words})
        adjectives[slot] = {w: (n, value) for n in names for value, words in _ADJECTIVE[n].items() for w in words}
    longest = sorted(nouns, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])"), nouns, adjectives


_NOUNS, _MEANING, _MODIFIES = _readers()


def read_phrases(text: str) -> dict[str, str]:
    """The attributes that a caption of this world states: {attribute: value}."""
    text, stated = text.lower(), {}
    for found in _NOUNS.finditer(text):
        slot, meaning = _MEANING[found[0]]
        stated.update(meaning)
        for word in reversed(text[: found.start()].split()):
            if word not in _MODIFIES[slot]:
                break
            name, value = _MODIFIES[slot][word]
            stated[name] = value
    return stated
