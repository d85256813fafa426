"""Domains, infrared, tracklets with gait, part masks, long captions: what each promises (specification 8.2)."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from reid_dist.data.synthetic import World, plan_synthetic, world_for
from reid_dist.data.synthetic.domain import style
from reid_dist.data.synthetic.heat import emissivity, thermal_background
from reid_dist.data.synthetic.identity import ATTRIBUTES, FAST, SLOW, Identity, draw_people
from reid_dist.data.synthetic.longtext import describe_long, diversify
from reid_dist.data.synthetic.palette import COLOURS
from reid_dist.data.synthetic.parts import additive, damaged, part_mask, part_shares
from reid_dist.data.synthetic.render import draw, shade
from reid_dist.data.synthetic.seeds import stream
from reid_dist.data.synthetic.words import read_phrases
from tests.unit.test_synthetic_world import someone, view

PEOPLE = draw_people(1, "synthetic", {"test": 30})["test"]


def pixels(image: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"), np.float32) / 255


# ---- domains


def test_shift_zero_changes_nothing_and_one_scalar_grades() -> None:
    plain, other = style("market", 0.0), style("duke", 0.0)
    assert plain.prior == other.prior
    assert (plain.turn == other.turn).all()
    assert plain.detail == other.detail == plain.grain == plain.spread == 1
    half, whole = style("duke", 0.5), style("duke", 1.0)
    values = ATTRIBUTES["upper_colour"]
    flat = np.full(len(values), 1 / len(values))
    tilt = [np.abs(np.array(s.prior["upper_colour"]) - flat).sum() for s in (half, whole)]
    assert 0.1 < tilt[0] < tilt[1]
    for a, b, c in ((1, half.detail, whole.detail), (1 / 1, 1 / half.spread, 1 / whole.spread)):
        assert a > b > c
    assert np.abs(half.tint).sum() == pytest.approx(np.abs(whole.tint).sum() / 2)
    assert style("market", 1.0).prior != whole.prior


@pytest.mark.parametrize("domain", ["market", "duke", "msmt", "cuhk"])
def test_named_colours_keep_their_names(domain: str) -> None:
    """The palette turns, but red is still nearest to red: captions stay true."""
    turn = style(domain, 1.0).turn
    names = list(COLOURS)
    table = np.array([COLOURS[name] for name in names])
    for name in names:
        turned = turn @ np.array(COLOURS[name])
        assert names[int(np.abs(table - turned).sum(1).argmin())] == name


def test_pictures_lose_detail_with_shift() -> None:
    detail = []
    for shift in (0.0, 0.5, 1.0):
        world = World(num_train=0, num_val=0, num_test=24, domain="duke", shift=shift, images_per_id=1)
        stack = np.stack([pixels(world.picture(p, *world.shots(p)[0])[0]) for p in world.people["test"]])
        detail.append(float(np.abs(np.diff(stack, axis=2)).mean()))
    assert detail[0] > 1.05 * detail[1] > 1.1 * detail[2], detail


def test_people_wear_what_is_common_in_their_domain() -> None:
    """Shares of values follow the domain's prior: nearer to it than to the one without a shift."""
    shifted = style("duke", 1.0).prior
    people = draw_people(0, "duke", {"train": 240}, shifted)["train"]
    nearer = []
    for name, values in ATTRIBUTES.items():
        worn = [p.attributes[name] for p in people if name in p.attributes]
        share = np.array([worn.count(value) / len(worn) for value in values])
        flat = np.array(style("duke", 0.0).prior.get(name, (1 / len(values),) * len(values)))
        nearer.append(np.abs(share - np.array(shifted[name])).sum() < np.abs(share - flat).sum())
    assert np.mean(nearer) > 0.8, nearer


# ---- infrared


def test_infrared_ignores_every_colour() -> None:
    """Two people who differ in all colours give the same infrared picture, to the byte; in shape, another one."""
    world = World(num_train=0, num_val=0, num_test=3)
    person = someone(hat="cap", hat_colour="red")
    other = someone(**{name: values[(values.index(person.attributes[name]) + 1) % len(values)]
                       for name, values in ATTRIBUTES.items() if name.endswith("colour") and name in person.attributes},
                    hat="cap")  # fmt: skip
    assert other.attributes != person.attributes
    pictures = [world.picture(p, 1, 0, modality="ir")[0] for p in (person, other)]
    assert pictures[0] == pictures[1]
    assert world.picture(person, 1, 0)[0] != world.picture(other, 1, 0)[0]
    assert world.picture(replace(person, skin=0.9), 1, 0, modality="ir")[0] == pictures[0]
    assert world.picture(someone(upper_type="coat", sleeve="long"), 1, 0, modality="ir")[0] != pictures[0]


def test_infrared_is_grey_and_inverts_its_background() -> None:
    world = World(num_train=0, num_val=0, num_test=3, difficulty="strong", num_cameras=6)
    person = world.people["test"][0]
    with Image.open(io.BytesIO(world.picture(person, 0, 0, modality="ir")[0])) as image:
        assert image.mode == "L"
    visible, thermal = [], []
    for camid in range(6):
        for modality, means in (("rgb", visible), ("ir", thermal)):
            image, drawing = world.picture(person, camid, 0, modality=modality)
            means.append(
                pixels(image)[..., 0 if modality == "ir" else slice(None)][drawing.front[::2, ::2] == 0].mean()
            )
    camera = [c.backdrop.mean() for c in world.cameras]
    assert np.corrcoef(camera, thermal)[0, 1] < -0.5
    assert np.corrcoef(visible, thermal)[0, 1] < 0.3


def test_pattern_layout_shows_in_infrared_at_low_contrast() -> None:
    scenes = {}
    for pattern in ("plain", "striped"):
        person = someone(pattern=pattern, bag="none")
        drawing = draw(person, view(0.0), (64, 32))
        scenes[pattern] = shade(drawing, emissivity(person), np.zeros((64, 32, 1), np.float32))
    difference = np.abs(scenes["plain"] - scenes["striped"])
    assert 0.05 < difference.max() < 0.15
    assert (difference > 0.04).sum() > 40


@pytest.mark.parametrize("upper", ATTRIBUTES["upper_type"])
def test_things_carried_and_worn_show_before_cloth_and_any_background(upper: str) -> None:
    """Bags, shoes and hats are shared cues (8.2): warmer than every wall, colder than every garment."""
    table = emissivity(someone(upper_type=upper))
    walls = thermal_background(np.linspace(0.05, 0.95, 10)[None])
    for thing in ("bag", "shoe", "hat"):
        assert table[thing].item() > walls.max() + 0.05
        assert table[thing].item() < min(table["upper"].item(), table["lower"].item()) - 0.1


def test_both_sensors_of_regdb_see_one_passage() -> None:
    """One side, place and distance in either modality of one passage, at other moments; more places than one."""
    world = world_for("regdb", num_test=6, images_per_id=6)
    plan = plan_synthetic(world, "regdb")
    for person in world.people["test"]:
        visible, thermal = ([s for s in plan if s.person is person and s.modality == m] for m in ("rgb", "ir"))
        assert [(s.seen_by, s.frame, s.pid) for s in visible] == [(s.seen_by, s.frame, s.pid) for s in thermal]
        assert {s.moment for s in visible}.isdisjoint(s.moment for s in thermal)
        assert len({s.seen_by for s in visible}) == world.cameras_per_id
    shot = plan[0]
    geometry = [world.picture(shot.person, shot.seen_by, 0, modality=m)[1].front for m in ("rgb", "ir")]
    assert (geometry[0] == geometry[1]).all()
    apart = replace(world, dual_sensor=False)
    assert (apart.picture(shot.person, shot.seen_by, 0, modality="ir")[1].front != geometry[0]).any()


# ---- tracklets


def test_tracklets_vary_in_length_and_have_holes() -> None:
    world = world_for("mars", num_train=60, num_test=30)
    tracklets: dict[int, list] = {}
    for shot in plan_synthetic(world, "mars"):
        tracklets.setdefault(shot.tracklet, []).append(shot)
    lengths = [len(shots) for shots in tracklets.values()]
    assert min(lengths) == 1
    assert max(lengths) > 10
    assert len(set(lengths)) > 8
    holes = [shots[-1].moment - shots[0].moment + 1 > len(shots) for shots in tracklets.values()]
    assert 0.3 < np.mean(holes) < 0.9
    assert all(len({(s.pid, s.camid, s.split) for s in shots}) == 1 for shots in tracklets.values())
    assert all(s.moment < t.moment for shots in tracklets.values() for s, t in itertools.pairwise(shots))


def test_background_stays_and_the_walker_moves() -> None:
    world = world_for("mars", num_train=0, num_test=6, twins=0.0)
    person = world.people["test"][0]
    frames = [world.picture(person, 0, f) for f in range(8)]
    empty = np.all([drawing.front[::2, ::2] == 0 for _, drawing in frames], axis=0)
    scenes = np.stack([pixels(image)[empty] for image, _ in frames])
    other = pixels(world.picture(world.people["test"][1], 0, 0)[0])[empty]
    assert np.abs(scenes - scenes.mean(0)).mean() < 0.7 * np.abs(scenes.mean(0) - other).mean()
    assert len({drawing.front.tobytes() for _, drawing in frames}) == 8


def test_twins_differ_in_gait_and_shoes_alone() -> None:
    people = draw_people(4, "video", {"test": 40}, twins=0.5)["test"]
    twins = [p for p in people if p.twin is not None]
    assert len(twins) == 20
    assert [p.index for p in people] == list(range(40))
    for person in twins:
        other = people[person.twin]
        assert other.twin == person.index
        assert {n for n in ATTRIBUTES if person.attributes.get(n) != other.attributes.get(n)} == {"shoe_colour"}
        assert {person.gait_speed, other.gait_speed} == {SLOW, FAST}
        same = replace(other, index=person.index, pid=person.pid, twin=person.twin, attributes=person.attributes,
                       gait_speed=person.gait_speed)  # fmt: skip
        assert same == person


def test_twins_are_told_apart_by_many_frames_and_not_by_one() -> None:
    """An observer who sees perfectly names the right twin from eight frames more often than from one."""
    world = world_for("mars", num_train=0, num_test=24, twins=1.0, num_distractors=0)
    right: dict[int, list[bool]] = {1: [], 8: []}
    for person in world.people["test"]:
        for camid in world.cameras_of(person):
            assert world.cameras_of(world.people["test"][person.twin]) == world.cameras_of(person)
            seen = ["shoe_colour" in world.picture(person, camid, f)[1].visible() for f in range(8)]
            right[1].append(seen[0])
            right[8].append(any(seen))
    assert 0.1 < np.mean(right[1]) < 0.5
    assert np.mean(right[8]) > 0.85


def test_half_hidden_frames_show_the_upper_or_the_lower_half() -> None:
    world = world_for("mars", num_train=0, num_test=12, num_distractors=0, half_hidden=0.6)
    seen = []
    for person in world.people["test"]:
        for frame in range(20):
            areas = world.picture(person, 0, frame)[1].parts(("head", "foot")).sum((1, 2))
            seen.append(areas > 0)
    head, feet = np.array(seen).T
    assert abs((~head).mean() - 0.3) < 0.08
    assert 0.3 <= (~feet).mean() < 0.6  # other things hide feet, too
    assert (head | feet).all()


def test_gait_is_a_phase_that_advances() -> None:
    """Legs of the fast twin change more from frame to frame than those of the slow one."""
    world = world_for("mars", num_train=0, num_test=12, twins=1.0, num_distractors=0, difficulty="mild")
    change: dict[float, list[float]] = {SLOW: [], FAST: []}
    for person in world.people["test"]:
        steps = [_leg_spread(world, person, frame) for frame in range(12)]
        change[person.gait_speed].append(float(np.abs(np.diff(steps)).mean()))
    assert np.mean(change[FAST]) > 1.3 * np.mean(change[SLOW])


def _leg_spread(world: World, person: Identity, frame: int) -> float:
    camera = world.cameras[0]
    side = replace(camera, yaws=np.eye(8)[2])  # from the side, where a stride is widest
    key = (world.seed, "gait", person.index)
    seen = world._view(person, side, stream(*key), stream(*key, frame), frame, 1.0)
    leg = draw(person, replace(seen, occluder=None), (64, 32)).parts(("leg",))[0]
    columns = leg.sum(0)
    place = np.arange(len(columns))
    middle = (columns * place).sum() / columns.sum()
    return float(np.sqrt((columns * (place - middle) ** 2).sum() / columns.sum()))


# ---- part masks


@pytest.mark.parametrize("size", [(64, 32), (128, 64), (72, 36)])
def test_masks_are_the_parts_by_area(size: tuple[int, int]) -> None:
    drawing = draw(someone(), view(0.4), size)
    shares = part_shares(drawing)
    exact = drawing.parts(("head", "torso", "arm", "leg", "foot"))
    patch = size[0] * size[1] / 128
    areas = [exact[0].sum(), exact[1:3].sum(), exact[3:].sum()]
    np.testing.assert_allclose(shares.sum(1) * patch, areas, rtol=1e-4)
    assert shares.shape == (3, 128)
    assert (shares.sum(0) <= 1 + 1e-5).all()
    mask = part_mask(drawing)
    assert mask.dtype == bool
    assert (mask == (shares >= 0.25)).all()
    rows = [np.flatnonzero(part.reshape(16, 8).any(1)).mean() for part in mask]
    assert rows == sorted(rows)


def test_a_part_that_is_barely_seen_keeps_one_patch_and_a_hidden_one_none() -> None:
    tiny = part_mask(draw(someone(), view(0.0, scale=0.12), (64, 32)))
    assert tiny.any(axis=1).all()
    hidden = part_mask(draw(someone(), view(0.0, occluder=(-0.1, 0.5, 1.2, 1.0)), (64, 32)))
    assert hidden.any(axis=1).tolist() == [True, True, False]


def test_additive_and_damaged_masks() -> None:
    mask = part_mask(draw(someone(), view(0.0), (64, 32)))
    added = additive(mask)
    assert added.dtype == np.float32
    assert ((added == 0) == mask).all()
    assert np.isneginf(added[~mask]).all()
    rng = np.random.default_rng(0)
    assert (damaged(mask, rng) == mask).all()
    assert not damaged(mask, rng, drop=1.0).any()
    flipped = np.mean([(damaged(mask, rng, noise=0.1) != mask).mean() for _ in range(50)])
    assert 0.08 < flipped < 0.12


# ---- long captions and sub-sentences


def test_long_captions_name_everything_at_length() -> None:
    words = []
    for person in PEOPLE:
        for k, training in enumerate((True, False)):
            caption = describe_long(person.attributes, training, stream(person.index, k))
            assert read_phrases(caption.text) == dict(person.attributes) == dict(caption.mentioned), caption.text
            assert "{" not in caption.text
            words.append(len(caption.text.split()))
    assert 70 < np.mean(words) < 120
    partial = describe_long(PEOPLE[0].attributes, True, stream(1), visible={"upper_colour", "hair_colour"})
    assert set(read_phrases(partial.text)) == {"upper_colour", "hair_colour"}


def test_long_frames_of_test_captions_are_held_out() -> None:
    frames = [
        {
            frame
            for p in PEOPLE
            for k in range(5)
            for frame, _ in describe_long(p.attributes, t, stream(p.index, k)).plan
        }
        for t in (True, False)
    ]
    assert min(len(found) for found in frames) >= 6
    assert not frames[0] & frames[1]


def test_groups_of_paraphrases_say_the_same_in_other_words() -> None:
    for person in PEOPLE[:10]:
        groups = diversify(person.attributes, set(person.attributes), stream(person.index))
        assert len(groups) == 6
        for group in groups:
            assert len(set(group)) == len(group) == 4
            assert len({tuple(sorted(read_phrases(text).items())) for text in group}) == 1
            assert all(text[0].isupper() and text.endswith(".") for text in group)
        assert {k: v for group in groups for k, v in read_phrases(group[0]).items()} == dict(person.attributes)
    assert diversify(PEOPLE[0].attributes, (), stream(1)) == ()


def test_new_knobs_leave_the_old_world_as_it_was() -> None:
    """Text pictures and captions do not change when paraphrases or long captions are asked for."""
    plain, more = (World(num_train=3, num_val=0, num_test=3, seed=2, diversity=d) for d in (False, True))
    a, b = (list(w.samples(plan_synthetic(w, "cuhk-pedes"))) for w in (plain, more))
    assert [(s.image, s.captions) for s in a] == [(s.image, s.captions) for s in b]
    assert all(s.diversity == () for s in a)
    assert all(len(s.diversity) == 2 for s in b)
