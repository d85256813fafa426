"""Captions of the synthetic world: attribute record -> noun phrases -> sentence plan (datasets specification 8.2).

A plan is a sequence of sentence frames with the slots that fill them. Training and validation draw from TRAIN_PLANS;
TEST_PLANS are held out, so that a model cannot score by matching templates. Up to three attributes are left out of
every caption. With `visible`, a caption speaks only of what its own image shows (no bag when the bag is hidden).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reid_dist.data.synthetic.identity import ATTRIBUTES, Attributes
from reid_dist.data.synthetic.words import SLOTS, phrase

Plan = tuple[tuple[str, tuple[str, ...]], ...]  # (frame, slots that fill its {}), ...

_WHO = ("person", "pedestrian", "walker", "passer-by")
MOST_OMITTED = 3

TRAIN_PLANS: tuple[Plan, ...] = (
    (("A {who} is wearing {}.", ("upper", "lower", "shoes")), ("The {who} has {}.", ("hair", "hat", "bag"))),
    (
        ("A {who} with {} walks by.", ("hair", "hat")),
        ("They wear {}.", ("upper", "lower")),
        ("They have {}.", ("shoes", "bag")),
    ),
    (
        ("This {who} has {}.", ("hair",)),
        ("Clothing: {}.", ("upper", "lower", "shoes")),
        ("The {who} is seen with {}.", ("bag", "hat")),
    ),
    (
        ("Dressed in {}, the {who} is walking.", ("upper", "lower")),
        ("The {who} carries {}.", ("bag",)),
        ("On the feet are {}.", ("shoes",)),
        ("The head shows {}.", ("hair", "hat")),
    ),
    (
        ("The {who} has on {}.", ("lower", "shoes")),
        ("Above there is {}.", ("upper",)),
        ("One also notices {}.", ("hair", "hat", "bag")),
    ),
    (
        ("A {who} has {}.", ("bag", "hair")),
        ("The clothes are {}.", ("upper", "lower", "shoes")),
        ("The {who} appears with {}.", ("hat",)),
    ),
    (
        ("There is a {who} in {}.", ("upper",)),
        ("Below one sees {}.", ("lower", "shoes")),
        ("The {who} has {}.", ("hat", "hair")),
        ("The {who} goes with {}.", ("bag",)),
    ),
    (
        ("With {}, this {who} moves along the street.", ("bag", "hat", "hair")),
        ("The {who} wears {}.", ("shoes", "lower", "upper")),
    ),
    (
        ("The picture shows a {who} who has {}.", ("hair", "hat", "bag")),
        ("The outfit consists of {}.", ("upper", "lower", "shoes")),
    ),
    (
        ("Somebody in {} is passing.", ("upper", "lower")),
        ("The {who} has {}.", ("hair", "hat")),
        ("Also visible: {}.", ("shoes", "bag")),
    ),
)
TEST_PLANS: tuple[Plan, ...] = (
    (
        ("We are looking for a {who} in {}.", ("upper", "lower", "shoes")),
        ("Further details: {}.", ("hair", "hat", "bag")),
    ),
    (("The {who} we saw had {}.", ("hair", "bag", "hat")), ("The {who} wore {}.", ("lower", "upper", "shoes"))),
    (
        ("It was a {who} with {}.", ("shoes", "lower")),
        ("The upper body was covered by {}.", ("upper",)),
        ("Witnesses remember {}.", ("bag", "hat", "hair")),
    ),
    (
        ("Walking past was a {who}, in {}.", ("lower", "upper")),
        ("What stood out: {}.", ("bag", "shoes")),
        ("The {who} came with {}.", ("hat", "hair")),
    ),
)


@dataclass(frozen=True, slots=True)
class Caption:
    """A text and what it states."""

    text: str
    mentioned: Mapping[str, str]  # {attribute: value}
    plan: Plan


def describe(wear: Attributes, plans: Sequence[Plan], rng: np.random.Generator,
             visible: Collection[str] | None = None) -> Caption:  # fmt: skip
    """One caption of a record, leaving out 0 to 3 attributes; with `visible`, speaking of those attributes only."""
    sayable = [name for name in ATTRIBUTES if name in wear and (visible is None or name in visible)]
    left_out = rng.permutation(len(sayable))[: int(rng.integers(0, MOST_OMITTED + 1))]
    mention = {name for i, name in enumerate(sayable) if i not in left_out}
    plan = plans[int(rng.integers(len(plans)))]
    said = {slot: phrase(slot, wear, mention, rng) for slot in SLOTS}
    who = str(rng.choice(_WHO))
    sentences = [frame.format(joined, who=who) for frame, slots in plan if (joined := _join([said[s] for s in slots]))]
    text = " ".join(sentences) or f"A {who} walks past."
    return Caption(text, {name: wear[name] for name in ATTRIBUTES if name in mention}, plan)


def _join(phrases: Sequence[str | None]) -> str:
    """ "a", "a and b", "a, b and c"; empty when there is nothing."""
    present = [text for text in phrases if text]
    return " and ".join(filter(None, [", ".join(present[:-1]), *present[-1:]]))
