"""Captions state the truth and nothing else; test plans are held out; the oracle answers from the record."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from reid_dist.data.synthetic import World
from reid_dist.data.synthetic.captions import MOST_OMITTED, TEST_PLANS, TRAIN_PLANS, describe
from reid_dist.data.synthetic.identity import ATTRIBUTES, draw_people
from reid_dist.data.synthetic.oracle import NOT_VISIBLE, answer, shows
from reid_dist.data.synthetic.seeds import stream
from reid_dist.data.synthetic.words import SLOTS, read_phrases, slot_attributes

PEOPLE = draw_people(1, "synthetic", {"test": 60})["test"]


def test_captions_state_exactly_what_they_mention() -> None:
    omitted = set()
    for person, k in itertools.product(PEOPLE, range(40)):
        caption = describe(person.attributes, TRAIN_PLANS + TEST_PLANS, stream(person.index, k))
        assert read_phrases(caption.text) == dict(caption.mentioned), caption.text
        assert caption.mentioned.items() <= person.attributes.items()
        omitted.add(len(person.attributes) - len(caption.mentioned))
        assert len(caption.text.split()) <= 50
        assert "{" not in caption.text
        assert "  " not in caption.text
    assert omitted == set(range(MOST_OMITTED + 1))


@pytest.mark.parametrize("plan", [*TRAIN_PLANS, *TEST_PLANS], ids=str)
def test_every_plan_places_every_slot_once(plan) -> None:
    assert sorted(slot for _, slots in plan for slot in slots) == sorted(SLOTS)
    full = [describe(person.attributes, [plan], stream(person.index)) for person in PEOPLE]
    assert any(len(c.mentioned) == len(p.attributes) for c, p in zip(full, PEOPLE, strict=True))


def test_plans_are_many_and_test_plans_held_out() -> None:
    assert len(set(TRAIN_PLANS)) >= 8
    frames = [{frame for plan in plans for frame, _ in plan} for plans in (TRAIN_PLANS, TEST_PLANS)]
    assert not frames[0] & frames[1]
    world = World(num_train=6, num_val=6, num_test=6)
    for split, plans in (("train", TRAIN_PLANS), ("val", TRAIN_PLANS), ("test", TEST_PLANS)):
        for person in world.people[split]:
            camid, frame = world.shots(person)[0]
            _, drawing = world.picture(person, camid, frame)
            assert all(caption.plan in plans for caption in world.captions(person, camid, frame, drawing))


def test_synonyms_vary() -> None:
    """One record and plan still gives many texts, and every slot but the shoes' noun has several wordings."""
    texts = {describe(PEOPLE[0].attributes, TRAIN_PLANS[:1], stream(k)).text for k in range(200)}
    assert len(texts) > 150


def test_visible_only_speaks_of_visible_things() -> None:
    person = PEOPLE[0]
    caption = describe(
        person.attributes, TRAIN_PLANS, stream(5), visible={"upper_colour", "shoe_colour", "sleeve", "bag"}
    )
    assert set(caption.mentioned) <= {"upper_colour", "shoe_colour", "sleeve", "bag"}
    nothing = describe(person.attributes, TRAIN_PLANS, stream(5), visible=())
    assert nothing.mentioned == {}
    assert read_phrases(nothing.text) == {}
    assert nothing.text.strip()


def test_every_pair_of_values_is_told_apart_in_words() -> None:
    """No word of one value reads as another value of the same slot, whatever else is mentioned."""
    for slot in SLOTS:
        names = [name for name in slot_attributes(slot) if name in ATTRIBUTES]
        for values in itertools.product(*(ATTRIBUTES[name] for name in names)):
            wear = dict(zip(names, values, strict=True))
            if "none" in values:
                wear = {name: value for name, value in wear.items() if value == "none"}
            from reid_dist.data.synthetic.words import phrase

            for k in range(3):
                text = phrase(slot, wear, names, np.random.default_rng(k))
                assert read_phrases(f"They have {text}, and so on.") == wear


RECORD = {
    "hair_length": "long", "hair_colour": "grey", "hat": "none", "upper_type": "jacket", "upper_colour": "red",
    "pattern": "striped", "sleeve": "long", "lower_type": "skirt", "lower_length": "short", "lower_colour": "blue",
    "bag": "backpack", "bag_colour": "green", "shoe_colour": "white",
}  # fmt: skip


@pytest.mark.parametrize(
    ("question", "stated"),
    [
        ("What is the colour of the upper body garment?", {"upper_colour": "red"}),
        ("What type of top is it?", {"upper_type": "jacket"}),
        ("Are the sleeves long?", {"sleeve": "long"}),
        ("Does the clothing show a pattern?", {"pattern": "striped"}),
        ("Which color are the shoes?", {"shoe_colour": "white"}),
        ("How long is the hair?", {"hair_length": "long"}),
        ("Is the person wearing a hat?", {"hat": "none"}),
        ("Does the person carry a bag?", {"bag": "backpack", "bag_colour": "green"}),
        ("Describe the lower body.", {"lower_type": "skirt", "lower_length": "short", "lower_colour": "blue"}),
    ],
)
def test_oracle_answers(question: str, stated: dict[str, str]) -> None:
    assert read_phrases(answer(RECORD, question)) == stated


def test_oracle_says_what_it_cannot_see() -> None:
    assert answer(RECORD, "Does the person wear glasses?") == NOT_VISIBLE
    assert answer(RECORD, "What colour is the bag?", visible={"upper_colour"}) == NOT_VISIBLE
    assert read_phrases(answer(RECORD, "Is there a bag?", visible={"bag"})) == {"bag": "backpack"}


def test_oracle_confirms_and_denies() -> None:
    assert shows(RECORD, "A walker in a striped red jacket with long grey hair.")
    assert not shows(RECORD, "A walker in a striped blue jacket with long grey hair.")
    assert not shows(RECORD, "A person with a red cap.")
    assert shows(RECORD, "A person with a red backpack.", visible={"upper_colour"})
    assert not shows(RECORD, "A person with a red backpack.")
