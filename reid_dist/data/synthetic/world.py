"""The synthetic world: people, cameras, pictures and captions from one seed (datasets specification 8.2).

Every picture follows from (seed, domain, split, person, camera, frame) alone. What belongs to a passage before one
camera (side, place, light) is drawn once per (person, camera), what belongs to a picture (stride, box error,
occluder, noise) per frame; so two frames of one camera are near duplicates, as in surveillance footage, and a
tracklet is a run of frames.

Synthetic scores show that code learns and scores correctly; they are no evidence about published accuracy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from reid_dist.data.layouts.base import Sample
from reid_dist.data.synthetic.body import View
from reid_dist.data.synthetic.camera import DIFFICULTIES, YAWS, Camera, Difficulty, draw_camera
from reid_dist.data.synthetic.captions import TEST_PLANS, TRAIN_PLANS, Caption, describe
from reid_dist.data.synthetic.domain import Style, style
from reid_dist.data.synthetic.heat import photograph_infrared
from reid_dist.data.synthetic.identity import Identity, draw_people
from reid_dist.data.synthetic.longtext import describe_long, diversify
from reid_dist.data.synthetic.render import Drawing, photograph
from reid_dist.data.synthetic.seeds import stream
from reid_dist.data.synthetic.shots import Shot
from reid_dist.errors import UserError

FEET_HIDDEN = 0.7  # share of a twin's frames in which something hides the shoes
SEEN = 0.85  # share of a passage's frames that a tracker keeps
HIP = 0.5  # height of the line at which `half_hidden` cuts, in body heights
SWAY = 0.05  # how far a box follows its walker late, in image widths


Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class World:
    """One world. The defaults are those of the text-to-image demo.

    Raises UserError for an unknown difficulty, and for numbers that do not fit together.
    """

    seed: int = 0
    domain: str = "synthetic"
    difficulty: str = "mild"  # "mild" | "strong": how much cameras change a picture
    size: tuple[int, int] = (64, 32)  # height, width in pixels
    num_train: int = 1000  # identities
    num_val: int = 40
    num_test: int = 60
    num_distractors: int = 0  # image worlds: people in the gallery that nobody asks for
    num_cameras: int = 6
    cameras_per_id: int = 3  # different cameras that see one person
    images_per_id: int = 3  # spread evenly over that person's cameras
    captions_per_image: int = 2
    visible_only: bool = True  # captions speak of what their image shows
    long_captions: bool = False  # naming everything, about 80 words
    diversity: bool = False  # captions come with groups of paraphrased sub-sentences
    shift: float = 0.0  # how far the domain looks from the others, 0 to 1
    max_frames: int = 1  # of a tracklet; 1: pictures
    twins: float = 0.0  # share of people whom gait and shoes alone tell apart
    half_hidden: float = 0.0  # share of a tracklet's frames that show one half of the person, upper or lower
    dual_sensor: bool = False  # infrared beside visible light: a person passes both at once, from the same side
    trials: int = 10  # divisions into training and test people, in sets that have several

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            near = difflib.get_close_matches(self.difficulty, DIFFICULTIES, n=1, cutoff=0) or list(DIFFICULTIES)
            raise UserError(
                f"difficulty={self.difficulty!r}: known are {', '.join(DIFFICULTIES)}; did you mean {near[0]!r}?"
            )
        if not 1 <= self.cameras_per_id <= self.num_cameras:
            raise UserError(f"cameras_per_id={self.cameras_per_id}: choose 1 to num_cameras={self.num_cameras}")
        if self.images_per_id < 1 or self.captions_per_image < 1:
            raise UserError(
                f"images_per_id={self.images_per_id}, captions_per_image={self.captions_per_image}: both from 1"
            )
        shares = {name: getattr(self, name) for name in ("shift", "twins", "half_hidden")}
        if not all(0 <= share <= 1 for share in shares.values()):
            raise UserError(f"{', '.join(f'{k}={v}' for k, v in shares.items())}: all between 0 and 1")
        if self.max_frames < 1 or self.trials < 1:
            raise UserError(f"max_frames={self.max_frames}, trials={self.trials}: both from 1")
        if min(self.size) < 16:
            raise UserError(f"size={self.size}: a figure needs 16 pixels and more each way (height, width)")

    @cached_property
    def people(self) -> dict[str, tuple[Identity, ...]]:
        """Identities of "test", "val", "train" and "distractor"; no two splits share one, nor a family of confusers.

        A split's people do not depend on the sizes of those after it, so more training people leave the test set as
        it is.
        """
        sizes = {
            "test": self.num_test,
            "val": self.num_val,
            "train": self.num_train,
            "distractor": self.num_distractors,
        }
        return draw_people(self.seed, self.domain, sizes, self.look.prior, self.twins)

    @cached_property
    def look(self) -> Style:
        """How this domain differs from others."""
        return style(self.domain, self.shift)

    @cached_property
    def cameras(self) -> tuple[Camera, ...]:
        """All cameras, by camid."""
        level: Difficulty = DIFFICULTIES[self.difficulty]
        return tuple(
            draw_camera(self.seed, self.domain, index, level, self.size, self.look) for index in range(self.num_cameras)
        )

    def cameras_of(self, person: Identity) -> tuple[int, ...]:
        """The camids that see a person, `cameras_per_id` of them."""
        index = person.index if person.twin is None else min(person.index, person.twin)  # twins meet the same cameras
        order = stream(self.seed, self.domain, person.split, index, "cameras").permutation(self.num_cameras)
        return tuple(int(camid) for camid in order[: self.cameras_per_id])

    def shots(self, person: Identity) -> list[tuple[int, int]]:
        """(camid, frame) of each of a person's images: every camera once before any twice."""
        cameras = self.cameras_of(person)
        return [(cameras[i % len(cameras)], i // len(cameras)) for i in range(self.images_per_id)]

    def tracklet(self, person: Identity, camid: int) -> list[int]:
        """Frames of a person's passage before a camera, from 0, with holes; often one only, at most `max_frames`."""
        rng = stream(self.seed, self.domain, person.split, person.index, camid, "tracklet")
        length = 1 if rng.random() < 0.1 else int(rng.integers(1, self.max_frames + 1))
        kept = [frame for frame in range(length) if rng.random() < SEEN]
        return kept or [0]

    def picture(
        self, person: Identity, camid: int, frame: int, zoom: float = 1.0, modality: str = "rgb"
    ) -> tuple[bytes, Drawing]:
        """JPEG bytes of one image and the geometry behind it, the same whenever and wherever they are asked for.

        `modality` "ir": by an infrared sensor at the camera's place, in another passage unless `dual_sensor`.
        """
        apart = modality != "rgb" and not self.dual_sensor
        key = (self.seed, self.domain, person.split, person.index, camid, *((modality,) if apart else ()))
        camera, passage = self.cameras[camid], stream(*key, "passage")
        rng = stream(*key, frame, "frame")
        view = self._view(person, camera, passage, rng, frame, zoom)
        if modality == "ir":
            return photograph_infrared(person, view, camera, passage, rng)
        return photograph(person, view, camera, passage, rng, self.look.turn if self.shift else None)

    def captions(self, person: Identity, camid: int, frame: int, drawing: Drawing) -> list[Caption]:
        """The image's captions; test people are described in plans that training never uses."""
        test = person.split == "test"
        visible = drawing.visible() if self.visible_only else None
        key = (self.seed, self.domain, person.split, person.index, camid, frame, "caption")
        if self.long_captions:
            return [
                describe_long(person.attributes, not test, stream(*key, k), visible)
                for k in range(self.captions_per_image)
            ]
        plans = TEST_PLANS if test else TRAIN_PLANS
        return [describe(person.attributes, plans, stream(*key, k), visible) for k in range(self.captions_per_image)]

    def paraphrases(self, person: Identity, camid: int, frame: int, captions: Iterable[Caption]) -> list[Groups]:
        """Per caption its groups of interchangeable sub-sentences, stating what the caption states."""
        key = (self.seed, self.domain, person.split, person.index, camid, frame, "diversity")
        return [diversify(person.attributes, c.mentioned, stream(*key, k)) for k, c in enumerate(captions)]

    def _view(self, person: Identity, camera: Camera, passage: np.random.Generator, rng: np.random.Generator,
              frame: int, zoom: float) -> View:  # fmt: skip
        level = DIFFICULTIES[self.difficulty]
        side = passage.choice(YAWS, p=camera.yaws) + passage.uniform(-0.3, 0.3)
        scale, light, start = passage.uniform(0.83, 0.91), passage.uniform(0.85, 1.15), passage.uniform(0, 2 * math.pi)
        # a tracker's boxes jump less than a detector's
        shift, lift, stretch = rng.normal(0, level.crop / (1 if self.max_frames == 1 else 2), 3)
        view = View(
            yaw=float(side * 2 * math.pi / YAWS),
            phase=float(start + person.gait_phase + person.gait_speed * frame),
            scale=float(scale * (1 + stretch) * zoom),
            shift_x=float(shift) + (zoom - 1) * float(rng.uniform(-0.25, 0.25)),
            foot=float(0.05 + lift) - (zoom - 1) * float(rng.uniform(0.2, 0.8)),
            occluder=_occluder(rng) if rng.random() < level.occlusion else None,
            light=float(light),
        )
        if self.max_frames > 1:  # the box runs after the walker
            view = replace(view, shift_x=view.shift_x + SWAY * math.sin(start + 0.5 * frame))
        if person.twin is not None and rng.random() < FEET_HIDDEN:
            view = replace(view, occluder=(-0.1, 1 - view.foot - 0.1 * view.scale, 1.2, 1.0))
        if self.half_hidden and self.max_frames > 1 and rng.random() < self.half_hidden:
            hip = 1 - view.foot - HIP * view.scale
            view = replace(view, occluder=(-0.1, *((hip, 1.2) if rng.random() < 0.5 else (hip - 2, 1.2)), 2.0))
        return view

    def sample(self, shot: Shot) -> tuple[Sample, Drawing]:
        """One image of a plan, to be written, and the geometry behind it."""
        person, camid, frame = shot.person, shot.seen_by, shot.moment
        image, drawing = self.picture(person, camid, frame, shot.zoom, shot.modality)
        captions = self.captions(person, camid, frame, drawing) if shot.captions else []
        groups = self.paraphrases(person, camid, frame, captions) if self.diversity else []
        sample = Sample(
            split=shot.split, pid=shot.pid, camid=shot.camid, frame=shot.frame, image=image, modality=shot.modality,
            tracklet=shot.tracklet, trials=shot.trials, captions=tuple(c.text for c in captions),
            diversity=tuple(groups),
        )  # fmt: skip
        return sample, drawing

    def samples(self, shots: Iterable[Shot]) -> Iterator[Sample]:
        """The images of a plan (data/synthetic/shots.py), in its order."""
        return (self.sample(shot)[0] for shot in shots)


def _occluder(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A post before the person, or something low that hides the feet."""
    if rng.random() < 0.5:
        return float(rng.uniform(0.1, 0.8)), float(rng.uniform(0.0, 0.4)), float(rng.uniform(0.08, 0.16)), 1.0
    top = float(rng.uniform(0.72, 0.88))
    return float(rng.uniform(-0.3, 0.3)), top, float(rng.uniform(0.6, 1.0)), 1.0 - top
