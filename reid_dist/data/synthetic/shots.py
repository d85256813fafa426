"""Which pictures a dataset consists of: plans of shots, by the shape of the set. Nothing is drawn here.

A shot says who is seen by which of the world's cameras at which moment, and what the dataset calls it. Ids, cameras,
tracklets and trials are those that the layout's parser returns, so that writer -> parser -> records is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reid_dist.data.synthetic.identity import Identity
from reid_dist.data.synthetic.seeds import stream

if TYPE_CHECKING:
    from reid_dist.data.synthetic.world import World

JUNK_ZOOM = 2.3  # a failed detection shows a part of a person
PAIR = 100_000  # ids of one camera pair (CUHK02, CUHK03 classic)
TRAINING = 10_000  # first training id of LLCM


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One picture to be taken. `person`, `seen_by`, `moment`, `zoom`, `modality` make it, the rest labels it."""

    person: Identity
    seen_by: int  # camera of the world
    moment: int  # frame of the passage
    split: str
    pid: int
    camid: int | None
    frame: int
    modality: str = "rgb"
    tracklet: int | None = None
    trials: tuple[str, ...] = ()
    captions: bool = False
    zoom: float = 1.0


def text_shots(world: World) -> list[Shot]:
    """Images with captions: train, val, test; ids count from 0 through the splits in that order."""
    shots, first = [], 0
    for split in ("train", "val", "test"):
        shots += [
            Shot(person=person, seen_by=camid, moment=frame, split=split, pid=first + person.index, camid=camid,
                 frame=frame, captions=True)
            for person in world.people[split]
            for camid, frame in world.shots(person)
        ]  # fmt: skip
        first += len(world.people[split])
    return shots


def image_shots(world: World) -> list[Shot]:
    """Images for retrieval: ids from 1, the first frame of each test (person, camera) asks, the rest is gallery.

    Distractors are people of the gallery alone, with ids of their own.
    """
    shots = [
        _plain(person, camid, frame, "train", 1 + person.index)
        for person in world.people["train"]
        for camid, frame in world.shots(person)
    ]
    first = 1 + world.num_train
    for person in world.people["test"]:
        for camid, frame in world.shots(person):
            shots.append(_plain(person, camid, frame, "gallery" if frame else "query", first + person.index))
    first += world.num_test
    return shots + [
        _plain(person, world.cameras_of(person)[0], 0, "gallery", first + person.index)
        for person in world.people["distractor"]
    ]


def market_shots(world: World) -> list[Shot]:
    """As `image_shots`, but all distractors are id 0, and failed detections (id -1) stand beside every other one."""
    shots = [shot for shot in image_shots(world) if shot.person.split != "distractor"]
    for person in world.people["distractor"]:
        camid = world.cameras_of(person)[0]
        shot = replace(_plain(person, camid, 0, "gallery", 0), frame=person.index)
        shots.append(shot)
        if person.index % 2:
            shots.append(replace(shot, moment=1, pid=-1, zoom=JUNK_ZOOM))
    return shots


def scene_shots(world: World) -> list[Shot]:
    """CUHK-SYSU: no cameras; a person's first picture asks."""
    shots = []
    for split, first in (("train", 1), ("test", 1 + world.num_train)):
        for person in world.people[split]:
            for number, (camid, frame) in enumerate(world.shots(person)):
                side = "train" if split == "train" else "gallery" if number else "query"
                shots.append(
                    Shot(person=person, seen_by=camid, moment=frame, split=side, pid=first + person.index, camid=None,
                         frame=number)
                )  # fmt: skip
    return shots


def _plain(person: Identity, camid: int, frame: int, split: str, pid: int) -> Shot:
    return Shot(person=person, seen_by=camid, moment=frame, split=split, pid=pid, camid=camid, frame=frame)


# ---- pairs of cameras


def pair_shots(world: World) -> list[Shot]:
    """CUHK02: two pictures in each view of a pair. Training people fill pairs 1 to 4 in turn, test people pair 5."""
    shots = []
    for split in ("train", "test"):
        for person in world.people[split]:
            pair, number = (person.index % 4 + 1, person.index // 4 + 1) if split == "train" else (5, person.index + 1)
            shots += [
                _plain(person, 2 * (pair - 1) + view, frame, split if split == "train" else ("query", "gallery")[view],
                       pair * PAIR + number)
                for view in (0, 1)
                for frame in (0, 1)
            ]  # fmt: skip
    return shots


def classic_shots(world: World) -> list[Shot]:
    """CUHK03 classic: up to five pictures in each view, `trials` divisions."""
    people = world.people["test"]
    shots = []
    for person, trials in zip(people, _trials(world, len(people), "test"), strict=True):
        pair, number = person.index % 5 + 1, person.index // 5 + 1
        for view in (0, 1):
            for frame in range(min(5, -(-world.images_per_id // 2))):
                camid = 2 * (pair - 1) + view
                shots.append(
                    Shot(person=person, seen_by=camid, moment=frame, split=trials[0], pid=pair * PAIR + number,
                         camid=camid, frame=frame, trials=trials)
                )  # fmt: skip
    return shots


def two_view_shots(world: World, first: int) -> list[Shot]:
    """PRID2011 (ids from 1) and VIPeR (from 0): one picture per view, divisions by the parser's own rule."""
    return [_plain(p, view, 0, "", first + p.index) for p in world.people["test"] for view in (0, 1)]


def prid_shots(world: World) -> list[Shot]:
    """Both views of the shared people, and people of the second camera alone from id 201 on."""
    alone = [_plain(person, 1, 0, "", 201 + person.index) for person in world.people["distractor"]]
    return two_view_shots(world, 1) + alone


def loose_shots(world: World) -> list[Shot]:
    """i-LIDS: numbered pictures without cameras, divisions by the parser's own rule."""
    return [
        Shot(person=person, seen_by=camid, moment=frame, split="", pid=1 + person.index, camid=None, frame=number)
        for person in world.people["test"]
        for number, (camid, frame) in enumerate(world.shots(person))
    ]


def grid_shots(world: World) -> list[Shot]:
    """GRID: a probe and a gallery picture from two cameras, and a gallery of strangers called 0."""
    people = world.people["test"]
    shots = []
    for person, sides in zip(people, _trials(world, len(people), "test"), strict=True):
        for number, camid in enumerate(world.cameras_of(person)[:2]):
            trials = tuple("train" if side == "train" else ("query", "gallery")[number] for side in sides)
            shots.append(
                Shot(person=person, seen_by=camid, moment=0, split=trials[0], pid=1 + person.index, camid=camid,
                     frame=number, trials=trials)
            )  # fmt: skip
    for person in world.people["distractor"]:
        camid = world.cameras_of(person)[0]
        shots.append(
            Shot(person=person, seen_by=camid, moment=0, split="gallery", pid=0, camid=camid, frame=100 + person.index,
                 trials=("gallery",) * world.trials)
        )  # fmt: skip
    return shots


def _trials(world: World, people: int, other: str) -> list[tuple[str, ...]]:
    """Per person its side in each division: half "train", half `other`."""
    trained = [
        {int(i) for i in stream(world.seed, world.domain, "trial", k).permutation(people)[: people // 2]}
        for k in range(world.trials)
    ]
    return [tuple("train" if index in chosen else other for chosen in trained) for index in range(people)]


# ---- video


def video_shots(world: World) -> list[Shot]:
    """One tracklet per (person, camera); a test person's first one asks, the others are gallery."""
    shots: list[Shot] = []
    for split, side in (("train", "train"), ("test", "query"), ("test", "gallery")):
        first = 1 if split == "train" else 1 + world.num_train
        for person in world.people[split]:
            for number, camid in enumerate(world.cameras_of(person)):
                if split == "train" or (number == 0) == (side == "query"):
                    shots += _passage(world, person, camid, side, first + person.index, _next(shots))
    return shots


def mars_shots(world: World) -> list[Shot]:
    """As `video_shots`, with distractors (id 0) and, beside every other one, failed detections (id -1)."""
    shots = video_shots(world)
    for person in world.people["distractor"]:
        camid = world.cameras_of(person)[0]
        shots += _passage(world, person, camid, "gallery", 0, _next(shots))
        if person.index % 2:
            shots += _passage(world, person, camid, "gallery", -1, _next(shots), JUNK_ZOOM)
    return shots


def two_camera_video_shots(world: World) -> list[Shot]:
    """iLIDS-VID: one tracklet in each of two cameras, ids with gaps, `trials` divisions."""
    people = world.people["test"]
    shots: list[Shot] = []
    for camid in (0, 1):
        for person, sides in zip(people, _trials(world, len(people), "test"), strict=True):
            trials = tuple("train" if side == "train" else ("query", "gallery")[camid] for side in sides)
            pid = 1 + person.index + person.index // 10  # every eleventh number is missing
            shots += _passage(world, person, camid, trials[0], pid, _next(shots), trials=trials)
    return shots


def _passage(world: World, person: Identity, camid: int, split: str, pid: int, tracklet: int, zoom: float = 1.0,
             trials: tuple[str, ...] = ()) -> list[Shot]:  # fmt: skip
    return [
        Shot(person=person, seen_by=camid, moment=frame, split=split, pid=pid, camid=camid, frame=1 + frame,
             tracklet=tracklet, trials=trials, zoom=zoom)
        for frame in world.tracklet(person, camid)
    ]  # fmt: skip


def _next(shots: list[Shot]) -> int:
    return 0 if not shots or shots[-1].tracklet is None else shots[-1].tracklet + 1


# ---- visible and infrared


def sysu_shots(world: World) -> list[Shot]:
    """Cameras 1 to 6, of which 3 and 6 are infrared; everybody is seen by all; validation people are marked as such."""
    first, shots = 1, list[Shot]()
    for split in ("train", "val", "test"):
        for person in world.people[split]:
            for camid in range(1, 7):
                modality = "ir" if camid in (3, 6) else "rgb"
                shots += _modal(world, person, camid, split, first + person.index, modality)
        first += len(world.people[split])
    return shots


def regdb_shots(world: World) -> list[Shot]:
    """Ten moments in each modality, of passages that both sensors saw; `trials` divisions of the same people.

    The places change and the set names none of them: its two cameras are the sensors.
    """
    people = world.people["test"]
    return [
        Shot(person=person, seen_by=place, moment=2 * moment + camid, split=trials[0], pid=1 + person.index,
             camid=camid, frame=frame, modality=modality, trials=trials)
        for person, trials in zip(people, _trials(world, len(people), "test"), strict=True)
        for camid, modality in enumerate(("rgb", "ir"))
        for frame, (place, moment) in enumerate(world.shots(person))
    ]  # fmt: skip


def llcm_shots(world: World) -> list[Shot]:
    """Cameras 1 to 9 in both modalities, but no infrared camera 3; a person meets some of them."""
    shots: list[Shot] = []
    for split, first in (("train", TRAINING), ("test", 1 + world.num_train)):
        for person in world.people[split]:
            for camera in world.cameras_of(person):
                for modality in ("rgb", "ir"):
                    if (camera + 1, modality) != (3, "ir"):
                        shots += _modal(world, person, camera + 1, split, first + person.index, modality)
    return shots


def _modal(world: World, person: Identity, camid: int, split: str, pid: int, modality: str) -> Iterator[Shot]:
    for frame in range(max(1, world.images_per_id // 2)):
        yield Shot(person=person, seen_by=camid - 1, moment=frame, split=split, pid=pid, camid=camid, frame=frame,
                   modality=modality)  # fmt: skip
