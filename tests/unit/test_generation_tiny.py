"""The small model: words, lessons, and batched towers that equal the library's own forward."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from reid_dist.data.synthetic.identity import ABSENT, ATTRIBUTES
from reid_dist.data.synthetic.oracle import shows
from reid_dist.data.synthetic.words import read_phrases
from reid_dist.generation.parsing import parse_boxes
from reid_dist.generation.tiny.lessons import Teacher, mirror
from reid_dist.generation.tiny.model import END, GRID, TOKENS, image_options, make_config, make_tokenizer
from reid_dist.generation.tiny.questions import (
    HIDDEN,
    attribute_answer,
    attribute_question,
    ground_answer,
    match_question,
    merged,
    pieces,
    read_attribute,
    rewordings,
    words_of,
)
from reid_dist.generation.tiny.samples import UNCLEAR, Pictures, draw_pictures
from reid_dist.generation.tiny.towers import PREFIX, pack, parted, patches, say, see


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return draw_pictures((901,), 6, "test", 2)


def test_answers_name_one_value_each() -> None:
    for attribute, values in ATTRIBUTES.items():
        words = words_of(attribute)
        assert len(set(words.values())) == len(words), attribute
        assert all(read_attribute(attribute, word) == (None if value == HIDDEN else value)
                   for value, word in words.items() if value in values or value == HIDDEN)  # fmt: skip
        assert read_attribute(attribute, "nonsense") is None


def test_truth_of_a_picture(pictures: Pictures) -> None:
    wear, everything = pictures.wear[0], frozenset(ATTRIBUTES)
    for attribute in ATTRIBUTES:
        assert attribute_answer(attribute, wear, frozenset()) == HIDDEN
        said = read_attribute(attribute, attribute_answer(attribute, wear, everything))
        assert said == wear.get(attribute)
    question = match_question(wear)
    assert question.count(",") == len(wear) - 1
    assert all(f"{attribute_question(name)} {words_of(name)[value]}" in question for name, value in wear.items())
    assert match_question({}) == ""


def test_rules_in_place_of_a_language_model_say_what_the_world_says() -> None:
    caption = "A person is wearing a red shirt and blue trousers. The person has no hat."
    observed = {"upper_colour": "green", "sleeve": "long", "hair_colour": "black", "hat": "cap", "hat_colour": "red"}
    text = merged(caption, observed)
    assert text.startswith(caption)
    assert read_phrases(text)["hair_colour"] == "black"
    assert read_phrases(text)["sleeve"] == "long"
    assert "green" not in text, "where both speak, the caption stands"
    assert "cap" not in text
    assert read_phrases(text)["hat"] == ABSENT
    parts = pieces(text)
    assert all(len(part.split()) >= 3 for part in parts)
    assert shows(read_phrases(text), " ".join(parts))
    assert {k: v for part in parts for k, v in read_phrases(part).items()} == read_phrases(text)
    for part in parts:
        others = rewordings(part, 5)
        assert len(others) >= 2
        assert all(read_phrases(other) == read_phrases(part) for other in others)
    assert rewordings("Nothing that this world knows.", 5) == []


def test_boxes_survive_their_words(pictures: Pictures) -> None:
    for box in pictures.boxes.reshape(-1, 4):
        if box[0] >= 0:
            assert parse_boxes(ground_answer(box / 32), "tiny") == [tuple(box / 32)]


def test_every_answer_is_one_token_and_targets_stand_where_they_are_said(pictures: Pictures) -> None:
    tokenizer = make_tokenizer()
    teacher = Teacher(pictures, tokenizer, np.random.default_rng(0))
    ids, targets = teacher.attribute(0, "upper_colour")
    assert tokenizer.decode(ids[:-1]).strip() == attribute_question("upper_colour")
    said = [tokenizer.decode([t]).strip() for t in targets if t >= 0]
    assert said == [attribute_answer("upper_colour", pictures.wear[0], pictures.visible[0]), END]


def test_a_match_question_is_judged_statement_by_statement(pictures: Pictures) -> None:
    tokenizer = make_tokenizer()
    teacher = Teacher(pictures, tokenizer, np.random.default_rng(0))
    verdicts = []
    for number in range(200):
        row = number % len(pictures)
        (ids, targets), fits = teacher.match(row)
        words = [tokenizer.decode([token]).strip() for token in ids]
        said = ["" if target < 0 else tokenizer.decode([target]).strip() for target in targets]
        colons = [place for place, word in enumerate(words) if word == ":"]
        true = True
        for place in colons:
            asked = tokenizer.decode(ids[: place + 1]).replace(",", " match").rsplit(" match ", 1)[-1]
            name = next(name for name in ATTRIBUTES if attribute_question(name) == asked)
            truth = attribute_answer(name, pictures.wear[row], pictures.visible[row])
            assert said[place] == truth
            assert said[place + 1] == ("yes" if truth in (words[place + 1], HIDDEN) else "no")
            true = true and said[place + 1] == "yes"
        assert fits == true
        assert words[-2] == "?"
        assert said[-2:] == ["yes" if fits else "no", END]
        assert sum(word != "" for word in said) == 2 * len(colons) + 2
        verdicts.append(fits)
    assert 0.35 < np.mean(verdicts) < 0.75


def test_questions_are_parted_in_their_order() -> None:
    lessons = [([number] * length, [-100] * length) for number, length in enumerate((3, 4, 9, 2, 2, 1))]
    groups = parted(lessons, 7)
    assert [[lesson[0][0] for lesson in group] for group in groups] == [[0, 1], [2], [3, 4, 5]]
    assert [lesson for group in groups for lesson in group] == lessons
    assert parted([], 7) == []


def test_pictures_are_the_same_for_any_number_of_processes() -> None:
    one, two = (draw_pictures((901, 902), 3, "train", 1, processes) for processes in (1, 2))
    for field in ("pixels", "answers", "boxes"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    assert (one.wear, one.visible) == (two.wear, two.visible)


def test_batched_towers_equal_the_library(pictures: Pictures) -> None:
    from PIL import Image
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(make_config(tokenizer)).eval()
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 5e6
    pixels = torch.from_numpy(pictures.pixels[:2])
    processor = Qwen2VLImageProcessor(**image_options())
    given = processor([Image.fromarray(image) for image in pictures.pixels[:2]], return_tensors="pt")
    assert given["image_grid_thw"].tolist() == [[1, *GRID]] * 2
    torch.testing.assert_close(patches(pixels).flatten(0, 1), given["pixel_values"], atol=1e-5, rtol=1e-5)
    questions = [tokenizer.encode(text) for text in ("hair colour: black", "where is head ? 03 04")]
    with torch.no_grad():
        seen = see(model.model.visual, pixels)
        logits = say(model, seen, pack([[(ids, ids) for ids in questions], [(questions[1], questions[1])]], 0))
        alone = (0, len(questions[0])), (1, 0)
        for picture, start in alone:
            config = model.config
            ids = [config.vision_start_token_id, *[config.image_token_id] * TOKENS, config.vision_end_token_id]
            whole = torch.tensor([[*ids, *questions[1]]])
            count = GRID[0] * GRID[1]
            expected = model(
                input_ids=whole, pixel_values=given["pixel_values"][picture * count : (picture + 1) * count],
                image_grid_thw=given["image_grid_thw"][:1], mm_token_type_ids=(whole == config.image_token_id).int(),
            ).logits[0, PREFIX:]  # fmt: skip
            torch.testing.assert_close(
                logits[picture, start : start + len(questions[1])], expected, atol=1e-5, rtol=1e-4
            )


def test_a_recipe_is_plain_json() -> None:
    from dataclasses import asdict

    from reid_dist.generation.tiny.train import Recipe

    assert json.loads(json.dumps(asdict(Recipe())))["seed"] == Recipe().seed


def test_the_built_in_weights_are_the_ones_that_the_recipe_made() -> None:
    from reid_dist.generation.model_folder import find_model
    from reid_dist.models.mllm_folder import SMALL

    model = find_model("small")
    facts = json.loads((SMALL / "recipe.json").read_text())
    assert facts["digest"] == model.digest
    assert model.prompts == "tiny"
    assert sum(path.stat().st_size for path in SMALL.iterdir()) < 9e6
    assert {name for point in facts["curve"] for name in ATTRIBUTES if name not in point} == set()


def test_mirrored_pictures_have_mirrored_boxes() -> None:
    boxes = np.array([[3, 1, 10, 9], [-1, -1, -1, -1]])
    assert mirror(boxes).tolist() == [[22, 1, 29, 9], [-1, -1, -1, -1]]
    assert (mirror(mirror(boxes)) == boxes).all()


def test_nothing_is_asked_about_what_is_neither_legible_nor_hidden(pictures: Pictures) -> None:
    unclear = replace(pictures, answers=np.full_like(pictures.answers, UNCLEAR))
    teacher = Teacher(unclear, make_tokenizer(), np.random.default_rng(0))
    assert all(len(teacher.draw(row, False, (14, 0, 1), False)) <= 1 for row in range(len(unclear)))
    share = (pictures.answers == UNCLEAR).mean()
    assert 0 < share < 0.1
    shown = [n in seen for seen in pictures.visible for n in ATTRIBUTES if n not in ("hat_colour", "bag_colour")]
    known = [a != UNCLEAR for row in pictures.answers for n, a in zip(ATTRIBUTES, row, strict=True)
             if n not in ("hat_colour", "bag_colour")]  # fmt: skip
    assert all(k for k, s in zip(known, shown, strict=True) if s), "what is legible is asked"
