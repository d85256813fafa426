"""Long captions that name everything (as UFine6926's, about 80 words), and paraphrased sub-sentences (RDA's form).

Both come from the same noun phrases as short captions, so `read_phrases` reads back what they state. Frames of test
captions are held out of training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from reid_dist.data.synthetic.captions import Caption
from reid_dist.data.synthetic.identity import ATTRIBUTES, Attributes
from reid_dist.data.synthetic.words import SLOTS, phrase

_WHO = ("person", "pedestrian", "walker", "passer-by")
_OPENING = {
    True: (
        "The picture was taken by a fixed camera and shows one {who} who is walking along, seen from head to toe.",
        "A single {who} can be seen in this picture, walking at an ordinary pace through a public place.",
        "In the middle of the frame there is a {who} on the move, and the description takes one detail at a time.",
    ),
    False: (
        "This record describes one {who} who came past the camera on foot, as far as the picture lets us tell.",
        "What follows is an account of a {who} whom the camera caught while walking across its field of view.",
    ),
}
# {training: {slot: frames}}
_FRAMES: Mapping[bool, Mapping[str, tuple[str, ...]]] = {
    True: {
        "hair": ("Looking at the head first, the {who} has {}, which is easy to see.", "At the head one notices {}."),
        "hat": (
            "As for what is worn above the forehead, the {who} has {}.",
            "Concerning the head there is also this: {}.",
        ),
        "upper": (
            "On the upper part of the body the {who} is dressed in {}, which covers the trunk and the shoulders.",
            "Around the shoulders, chest and arms the {who} is wearing {}.",
        ),
        "lower": (
            "Further down, around the hips and the legs, the {who} has put on {}.",
            "From the waist downwards the {who} is wearing {}, which moves with every step.",
        ),
        "bag": (
            "When it comes to things that are carried along, the {who} has {}.",
            "As to what the {who} takes along on the way, there is {}.",
        ),
        "shoes": (
            "At the very bottom of the picture the {who} is walking in {}.",
            "The steps are made in {}, close to the ground.",
        ),
    },
    False: {
        "hair": ("Of the head it can be said that the {who} has {}.",),
        "hat": ("Right above the brow the observer finds {}.",),
        "upper": ("The trunk and the arms of the {who} are clad in {}, as the picture makes clear.",),
        "lower": ("The part between the waist and the ankles is clothed in {}, according to the observer.",),
        "bag": ("In addition the observer has written down that the {who} goes along with {}.",),
        "shoes": ("Finally, the ground is touched by {}.",),
    },
}
_CLAUSES = (
    "The {who} has {}.",
    "There is a {who} with {}.",
    "One can see {}.",
    "{} can be seen on the {who}.",
    "The {who} is seen with {}.",
    "The {who} in the picture has {}.",
)


def describe_long(
    wear: Attributes, training: bool, rng: np.random.Generator, visible: Collection[str] | None = None
) -> Caption:
    """One caption that names every attribute, or with `visible` every one of those; slots in a random order."""
    mention = {name for name in ATTRIBUTES if name in wear and (visible is None or name in visible)}
    who = str(rng.choice(_WHO))
    sentences = [str(rng.choice(_OPENING[training]))]
    plan = []
    for slot in rng.permutation(list(SLOTS)):
        said = phrase(slot, wear, mention, rng)
        frame = str(rng.choice(_FRAMES[training][slot]))
        if said:
            sentences.append(frame.replace("{}", said))
            plan.append((frame, (str(slot),)))
    text = " ".join(sentence.replace("{who}", who) for sentence in sentences)
    return Caption(text, {name: wear[name] for name in ATTRIBUTES if name in mention}, tuple(plan))


def diversify(
    wear: Attributes, mentioned: Collection[str], rng: np.random.Generator, paraphrases: int = 4
) -> tuple[tuple[str, ...], ...]:
    """Groups of interchangeable sub-sentences, one per slot that is mentioned: each states the same attributes in other
    words.
    """
    groups: list[tuple[str, ...]] = []
    for slot in SLOTS:
        texts: Sequence[str] = ()
        for frame in rng.permutation(list(_CLAUSES))[:paraphrases]:
            said = phrase(slot, wear, mentioned, rng)
            if said:
                text = str(frame).replace("{who}", str(rng.choice(_WHO))).replace("{}", said)
                texts = (*texts, text[0].upper() + text[1:])
        if texts:
            groups.append(tuple(texts))
    return tuple(groups)
