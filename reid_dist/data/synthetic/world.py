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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from reid_dist.data.layouts.base import Sample
from reid_dist.data.synthetic.body import View
from reid_dist.data.synthetic.camera import DIFFICULTIES, YAWS, Camera, Difficulty, draw_camera
from reid_dist.data.synthetic.captions import TEST_PLANS, TRAIN_PLANS, Caption, describe
from reid_dist.data.synthetic.identity import Identity, draw_people
from reid_dist.data.synthetic.render import Drawing, photograph
from reid_dist.data.synthetic.seeds import stream
from reid_dist.errors import UserError

JUNK_ZOOM = 2.3  # a failed detection shows a part of a person


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
        return draw_people(self.seed, self.domain, sizes)

    @cached_property
    def cameras(self) -> tuple[Camera, ...]:
        """All cameras, by camid."""
        level: Difficulty = DIFFICULTIES[self.difficulty]
        return tuple(draw_camera(self.seed, self.domain, index, level, self.size) for index in range(self.num_cameras))

    def cameras_of(self, person: Identity) -> tuple[int, ...]:
        """The camids that see a person, `cameras_per_id` of them."""
        order = stream(self.seed, self.domain, person.split, person.index, "cameras").permutation(self.num_cameras)
        return tuple(int(camid) for camid in order[: self.cameras_per_id])

    def shots(self, person: Identity) -> list[tuple[int, int]]:
        """(camid, frame) of each of a person's images: every camera once before any twice."""
        cameras = self.cameras_of(person)
        return [(cameras[i % len(cameras)], i // len(cameras)) for i in range(self.images_per_id)]

    def picture(self, person: Identity, camid: int, frame: int, zoom: float = 1.0) -> tuple[bytes, Drawing]:
        """JPEG bytes of one image and the geometry behind it, the same whenever and wherever they are asked for."""
        key = (self.seed, self.domain, person.split, person.index, camid)
        camera, passage = self.cameras[camid], stream(*key, "passage")
        rng = stream(*key, frame, "frame")
        return photograph(person, self._view(person, camera, passage, rng, frame, zoom), camera, passage, rng)

    def captions(self, person: Identity, camid: int, frame: int, drawing: Drawing) -> list[Caption]:
        """The image's captions; test people are described in plans that training never uses."""
        plans = TEST_PLANS if person.split == "test" else TRAIN_PLANS
        visible = drawing.visible() if self.visible_only else None
        key = (self.seed, self.domain, person.split, person.index, camid, frame, "caption")
        return [describe(person.attributes, plans, stream(*key, k), visible) for k in range(self.captions_per_image)]

    def _view(self, person: Identity, camera: Camera, passage: np.random.Generator, rng: np.random.Generator,
              frame: int, zoom: float) -> View:  # fmt: skip
        level = DIFFICULTIES[self.difficulty]
        side = passage.choice(YAWS, p=camera.yaws) + passage.uniform(-0.3, 0.3)
        scale, light, start = passage.uniform(0.83, 0.91), passage.uniform(0.85, 1.15), passage.uniform(0, 2 * math.pi)
        shift, lift, stretch = rng.normal(0, level.crop, 3)
        return View(
            yaw=float(side * 2 * math.pi / YAWS),
            phase=float(start + person.gait_phase + person.gait_speed * frame),
            scale=float(scale * (1 + stretch) * zoom),
            shift_x=float(shift) + (zoom - 1) * float(rng.uniform(-0.25, 0.25)),
            foot=float(0.05 + lift) - (zoom - 1) * float(rng.uniform(0.2, 0.8)),
            occluder=_occluder(rng) if rng.random() < level.occlusion else None,
            light=float(light),
        )

    def text_samples(self) -> Iterator[Sample]:
        """Images with captions: train, val, test. Ids count from 0 through the splits in that order."""
        first = 0
        for split in ("train", "val", "test"):
            for person in self.people[split]:
                for camid, frame in self.shots(person):
                    image, drawing = self.picture(person, camid, frame)
                    texts = tuple(caption.text for caption in self.captions(person, camid, frame, drawing))
                    yield Sample(
                        split=split, pid=first + person.index, camid=camid, frame=frame, image=image, captions=texts
                    )
            first += len(self.people[split])

    def image_samples(self) -> Iterator[Sample]:
        """Images for image-to-image retrieval: ids from 1, the first frame of each test (person, camera) a query.

        The rest is gallery, with distractors (id 0) and failed detections (id -1, one for two distractors).
        """
        for person in self.people["train"]:
            for camid, frame in self.shots(person):
                yield Sample(
                    split="train",
                    pid=1 + person.index,
                    camid=camid,
                    frame=frame,
                    image=self.picture(person, camid, frame)[0],
                )
        for person in self.people["test"]:
            for camid, frame in self.shots(person):
                split, pid = "gallery" if frame else "query", 1 + self.num_train + person.index
                yield Sample(
                    split=split, pid=pid, camid=camid, frame=frame, image=self.picture(person, camid, frame)[0]
                )
        for person in self.people["distractor"]:
            camid = self.cameras_of(person)[0]
            yield Sample(
                split="gallery", pid=0, camid=camid, frame=person.index, image=self.picture(person, camid, 0)[0]
            )
            if person.index % 2:
                image = self.picture(person, camid, 1, zoom=JUNK_ZOOM)[0]
                yield Sample(split="gallery", pid=-1, camid=camid, frame=person.index, image=image)

    def num_samples(self, task: str) -> int:
        """How many samples `text_samples` or `image_samples` yields."""
        shared = (self.num_train + self.num_test) * self.images_per_id
        return shared + (self.num_val * self.images_per_id if task == "text" else self.num_distractors * 3 // 2)


def _occluder(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A post before the person, or something low that hides the feet."""
    if rng.random() < 0.5:
        return float(rng.uniform(0.1, 0.8)), float(rng.uniform(0.0, 0.4)), float(rng.uniform(0.08, 0.16)), 1.0
    top = float(rng.uniform(0.72, 0.88))
    return float(rng.uniform(-0.3, 0.3)), top, float(rng.uniform(0.6, 1.0)), 1.0 - top
