"""People of the synthetic world: distances between identities, confusers, disjoint splits, equal marginals."""

from __future__ import annotations

import numpy as np
import pytest

from reid_dist.data.synthetic.identity import ATTRIBUTES, OWNER, differing, draw_people
from reid_dist.errors import UserError

SIZES = {"test": 60, "val": 40, "train": 301, "distractor": 6}


@pytest.fixture(scope="module")
def people():
    return draw_people(3, "synthetic", SIZES)


def test_differing_counts_a_missing_thing_once() -> None:
    red = {"hat": "none", "bag": "backpack", "bag_colour": "red"}
    assert differing(red, {"hat": "none", "bag": "none"}) == ("bag",)
    assert differing(red, {"hat": "none", "bag": "handbag", "bag_colour": "blue"}) == ("bag", "bag_colour")
    assert differing(red, red | {"hat": "cap", "hat_colour": "red"}) == ("hat",)
    assert differing(red, red) == ()


def test_confusers_and_distances(people) -> None:
    """Over all splits together: within a family exactly 2, otherwise 3 or more; so each has 2 or 3 confusers."""
    everyone = [person for split in people.values() for person in split]
    for i, a in enumerate(everyone):
        confusers = 0
        for j, b in enumerate(everyone):
            if i == j:
                continue
            distance = len(differing(a.attributes, b.attributes))
            family = (a.split, a.family) == (b.split, b.family)
            assert distance == 2 if family else distance >= 3
            confusers += family
        assert confusers in (2, 3)


def test_sizes_families_and_records(people) -> None:
    assert {split: len(members) for split, members in people.items()} == SIZES
    assert len({person.family for person in people["test"]}) == 20
    for split, members in people.items():
        assert [person.index for person in members] == list(range(SIZES[split]))
        for person in members:
            wear = person.attributes
            assert all(value in ATTRIBUTES[name] for name, value in wear.items())
            missing = set(ATTRIBUTES) - set(wear)
            assert missing == {name for name, thing in OWNER.items() if wear[thing] == "none"}
            assert not (wear["upper_type"] == "coat" and wear["sleeve"] == "short")


def test_marginals_are_equal_between_splits() -> None:
    """Share of each value in train and test, 240 people each over 5 seeds, within 5 standard errors.

    Members of a family share most attributes, so a family counts as one draw.
    """
    drawn = [draw_people(seed, "synthetic", {"test": 240, "train": 240}) for seed in range(5)]
    families = 5 * 80
    for name, values in ATTRIBUTES.items():
        for value in values:
            shares = [
                np.mean([person.attributes.get(name) == value for world in drawn for person in world[split]])
                for split in ("test", "train")
            ]
            middle = sum(shares) / 2
            error = np.sqrt(2 * middle * (1 - middle) / families)
            assert middle > 0, f"{name}={value} never occurs"
            assert abs(shares[0] - shares[1]) < 5 * error, f"{name}={value}: {shares}"


def test_earlier_splits_do_not_depend_on_later_ones() -> None:
    small = draw_people(3, "synthetic", {"test": 60, "val": 40, "train": 3})
    large = draw_people(3, "synthetic", SIZES)
    assert small["test"] == large["test"]
    assert small["val"] == large["val"]


def test_seed_and_domain_change_everyone() -> None:
    worlds = [draw_people(seed, domain, {"test": 30})["test"] for seed, domain in ((0, "a"), (1, "a"), (0, "b"))]
    records = [tuple(tuple(sorted(p.attributes.items())) for p in world) for world in worlds]
    assert len(set(records)) == 3


@pytest.mark.parametrize("people_wanted", [1, 2, 5, -3])
def test_impossible_sizes(people_wanted: int) -> None:
    with pytest.raises(UserError, match=f"{people_wanted} test identities"):
        draw_people(0, "synthetic", {"test": people_wanted})


@pytest.mark.parametrize("people_wanted", [0, 3, 4, 6, 7, 8, 9, 10, 11])
def test_possible_sizes(people_wanted: int) -> None:
    assert len(draw_people(0, "synthetic", {"test": people_wanted})["test"]) == people_wanted
