"""Who walks through the synthetic world: attribute records, drawn in families of confusers.

Datasets specification 8.2. Any two identities differ in at least two attributes, and every identity has two or three
*confusers* that differ from it in exactly two; identities of other families, and so of other splits, differ in three
or more. That keeps ranking hard and gives captions a purpose: whoever ignores two attributes cannot tell a family
apart.

Families are codes: over three attributes i, j, k with two values each, the words of even weight (000, 110, 101, 011)
differ pairwise in exactly two places. A family is three of them, or all four.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from reid_dist.data.synthetic.seeds import stream
from reid_dist.errors import UserError

GARMENT_COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")

# Every attribute with its values, in the order of the figure from head to foot. Prior: uniform, but for PRIOR.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "hair_length": ("short", "long"),
    "hair_colour": ("black", "brown", "blond", "grey"),
    "hat": ("none", "cap", "beanie"),
    "hat_colour": ("black", "white", "red", "blue", "green"),
    "upper_type": ("shirt", "hoodie", "jacket", "coat"),
    "upper_colour": GARMENT_COLOURS,
    "pattern": ("plain", "striped", "checked", "printed"),
    "sleeve": ("short", "long"),
    "lower_type": ("trousers", "skirt"),
    "lower_length": ("short", "long"),
    "lower_colour": ("black", "white", "grey", "blue", "brown", "green", "red"),
    "bag": ("none", "backpack", "shoulder bag", "handbag"),
    "bag_colour": ("black", "red", "blue", "green", "yellow", "brown"),
    "shoe_colour": ("black", "white", "red", "brown", "blue"),
}
Prior = Mapping[str, tuple[float, ...]]  # {attribute: probability of each value}; absent: uniform
PRIOR: Prior = {"hat": (0.5, 0.25, 0.25), "pattern": (0.4, 0.2, 0.2, 0.2)}
OWNER: Mapping[str, str] = {"hat_colour": "hat", "bag_colour": "bag"}  # an attribute of a thing that may be absent
ABSENT = "none"
BETWEEN_FAMILIES = 3  # least number of differing attributes between identities of two families

Attributes = Mapping[str, str]  # an attribute whose thing is absent has no entry
_CODE = ((0, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1))
_TRIES = 2000
SLOW, FAST = 0.35, 1.05  # gait of twins, radians per frame


@dataclass(frozen=True, slots=True)
class Identity:
    """One person. `split` and `index` key every draw; `pid` is the label in the written dataset."""

    split: str
    index: int
    pid: int
    family: int  # number of the family within the split
    attributes: Attributes
    skin: float  # 0 (light) .. 1 (dark); never captioned
    height: float  # factor on the mean body
    width: float
    gait_phase: float  # radians
    gait_speed: float  # radians per frame
    fabric: tuple[float, ...]  # nine offsets in [-1, 1] that shift this person's dyes a little
    twin: int | None = None  # index of the person who differs in gait and shoes alone


def differing(a: Attributes, b: Attributes) -> tuple[str, ...]:
    """Attributes in which two records differ. The colour of a thing that either lacks is not counted beside the
    thing.
    """
    return tuple(
        name
        for name in ATTRIBUTES
        if a.get(name) != b.get(name) and not (name in OWNER and (name not in a or name not in b))
    )


def draw_families(
    seed: int, domain: str, sizes: Mapping[str, int], prior: Prior = PRIOR
) -> dict[str, list[list[Attributes]]]:
    """Families of attribute records per split, `sizes` people each; earlier splits do not depend on later ones.

    Raises UserError when a split's size is 1, 2 or 5 (families have three or four members), or the attribute space is
    too small for that many.
    """
    taken: list[np.ndarray] = []
    result: dict[str, list[list[Attributes]]] = {}
    for split, people in sizes.items():
        fours = people % 3
        if people < 0 or people < 4 * fours:
            raise UserError(
                f"synthetic world: {people} {split} identities; families have 3 or 4, so choose 3, 4 or 6 and more"
            )
        families = []
        for number in range(people // 3 - fours + fours):
            members = 4 if number < fours else 3
            families.append(_draw_family((seed, domain, "family", split, number), members, taken, prior))
        result[split] = families
    return result


def _draw_family(key: tuple[int | str, ...], members: int, taken: list[np.ndarray], prior: Prior) -> list[Attributes]:
    rng = stream(*key)
    everyone = np.concatenate(taken) if taken else np.zeros((0, len(ATTRIBUTES)), np.int8)
    for _ in range(_TRIES):
        family = _confusers(_draw_record(rng, prior), rng)[:members]
        if len(family) < members:
            continue
        codes = np.stack([_code(record) for record in family])
        if all(_distances(code, everyone).min(initial=BETWEEN_FAMILIES) >= BETWEEN_FAMILIES for code in codes):
            taken.append(codes)
            return family
    raise UserError(f"synthetic world: no room for another family after {len(everyone)} identities; ask for fewer")


def _draw_record(rng: np.random.Generator, prior: Prior) -> dict[str, str]:
    record = {name: str(rng.choice(values, p=prior.get(name))) for name, values in ATTRIBUTES.items()}
    return _settled(record)


def _settled(record: dict[str, str]) -> dict[str, str]:
    """Without attributes of absent things; a coat has long sleeves."""
    if record["upper_type"] == "coat":
        record["sleeve"] = "long"
    return {name: value for name, value in record.items() if record.get(OWNER.get(name, "")) != ABSENT}


def _confusers(base: dict[str, str], rng: np.random.Generator) -> list[Attributes]:
    """`base` and its confusers; empty when the drawn attributes do not make a family of exact distances."""
    axes = [str(name) for name in rng.choice(list(base), size=3, replace=False)]
    other = {name: str(rng.choice([value for value in ATTRIBUTES[name] if value != base[name]])) for name in axes}
    colours = {name: str(rng.choice(ATTRIBUTES[name])) for name in OWNER}  # for a thing that appears in a confuser
    family = []
    for word in _CODE:
        changed = {name: other[name] for name, bit in zip(axes, word, strict=True) if bit}
        family.append(_settled({**colours, **base, **changed}))
    exact = all(len(differing(a, b)) == 2 for a, b in combinations(family, 2))
    order = rng.permutation(len(family))
    return [family[i] for i in order] if exact else []


def _code(record: Attributes) -> np.ndarray:
    """int8 [attributes]; -1 where the thing is absent."""
    return np.array([ATTRIBUTES[n].index(record[n]) if n in record else -1 for n in ATTRIBUTES], np.int8)


def _distances(code: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`differing` against many at once: absent entries (-1) of either side do not count."""
    return ((others != code) & (others >= 0) & (code >= 0)).sum(axis=1)


def draw_people(
    seed: int, domain: str, sizes: Mapping[str, int], prior: Prior = PRIOR, twins: float = 0.0
) -> dict[str, tuple[Identity, ...]]:
    """All identities per split. Marginals are equal over splits: one prior, one family scheme. Raises UserError.

    `twins`: share of people who come in pairs that only gait and shoes tell apart (worlds of tracklets).
    """
    people: dict[str, tuple[Identity, ...]] = {}
    for split, families in draw_families(seed, domain, sizes, prior).items():
        members = [(number, record) for number, family in enumerate(families) for record in family]
        drawn = [_person(seed, domain, split, index, number, record) for index, (number, record) in enumerate(members)]
        for index in range(1, int(len(drawn) * twins) // 2 * 2, 2):
            drawn[index - 1 : index + 1] = _twins(drawn[index - 1])
        people[split] = tuple(drawn)
    return people


def _twins(one: Identity) -> tuple[Identity, Identity]:
    """A slow walker and a fast one in other shoes, alike in everything else that can be seen."""
    colours = ATTRIBUTES["shoe_colour"]
    shoes = colours[(colours.index(one.attributes["shoe_colour"]) + 2) % len(colours)]
    slow = replace(one, gait_speed=SLOW, twin=one.index + 1)
    other = replace(one, index=one.index + 1, pid=one.pid + 1, gait_speed=FAST, twin=one.index)
    return slow, replace(other, attributes={**one.attributes, "shoe_colour": shoes})


def _person(seed: int, domain: str, split: str, index: int, family: int, record: Attributes) -> Identity:
    rng = stream(seed, domain, "person", split, index)
    return Identity(
        split=split,
        index=index,
        pid=index,
        family=family,
        attributes=record,
        skin=float(rng.uniform()),
        height=float(rng.uniform(0.93, 1.05)),
        width=float(rng.uniform(0.9, 1.15)),
        gait_phase=float(rng.uniform(0, 2 * np.pi)),
        gait_speed=float(rng.uniform(0.5, 1.1)),
        fabric=tuple(float(v) for v in rng.uniform(-1, 1, size=9)),
    )
