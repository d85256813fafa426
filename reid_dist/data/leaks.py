"""The leak guard: no identity of a dataset, and no image of any, may stand both in training and in query or gallery.

Runs on table columns alone, before any GPU is taken. Everything that training derives (statistics, masks, generated
captions, memory passes) is computed from the training rows, so looking at these rows covers it. Digests find the same
image under another dataset's name; people are compared within a dataset, because identity numbers of two datasets mean
nothing to each other. Cameras that both sides share are normal inside a dataset and only reported.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from reid_dist.data.store import TableView
from reid_dist.errors import UserError

logger = logging.getLogger(__name__)

TESTED = ("query", "gallery", "test")
WITH_DISTRACTORS = ("market-1501", "mars")  # domains whose id 0 is no person; elsewhere 0 is an ordinary id
SHOWN = 5  # offenders named in the message


class LeakError(UserError):
    """Training rows that stand in query or gallery too."""


def tested(view: TableView) -> TableView:
    """The rows of a view that stand in query or gallery in any of its trials (train/test divisions)."""
    row, _, split = view.trial_rows()
    mask = np.zeros(len(view), dtype=bool)
    mask[row[np.isin(split, TESTED)]] = True
    return view.select(mask)


def only_people(view: TableView) -> TableView:
    """Without junk (negative ids) and, in a gallery, distractors (id 0 of Market-1501 and MARS): they are nobody."""
    distractor = (view.pid == 0) & (view.split == "gallery") & np.isin(view.domain_name, WITH_DISTRACTORS)
    nobody = (view.pid < 0) | distractor
    return view.select(~nobody) if nobody.any() else view


def check_leaks(train: TableView, test: TableView) -> dict[str, list[int]]:
    """Refuse training on what is tested; returns the cameras that both sides share, {dataset: camera numbers}.

    Args:
        train: every row that training sees.
        test: the tables that will be scored, whole. Of a dataset that is trained on, the view's own trial counts; of
            any other, every trial.
    Raises LeakError naming identities and images with one path of each side. Junk (pid below 0) is nobody.
    """
    known = np.isin(test.domain_name, np.unique(train.domain_name))
    now, ever = np.isin(test.split, TESTED), np.zeros(len(test), dtype=bool)
    row, _, split = test.trial_rows()
    ever[row[np.isin(split, TESTED)]] = True
    test = test.select(np.where(known, now, ever))
    images = _shared(_images(train), _images(test))
    people = _shared(_identities(train), _identities(test))
    offences = [
        *(f"identity {train.pid[a]} of {train.domain_name[a]} ({_pair(train, a, test, b)})" for a, b in people[:SHOWN]),
        *(f"image {_pair(train, a, test, b)}" for a, b in images[:SHOWN]),
    ]
    if offences:
        raise LeakError(
            f"test data stands in training: {len(people)} identities and {len(images)} images of {test.describe()} are "
            f"in query or gallery and in the training rows of {train.describe()}: {'; '.join(offences)}. Take them "
            "out of data.train or data.test, or choose the division (data.trial) that keeps them apart"
        )
    shared = _shared_cameras(train, test)
    for name, cameras in shared.items():
        logger.info("leak guard: both sides share cameras %s of %s, which is normal within a dataset", cameras, name)
    logger.info("leak guard: no identity and no image of %d tested rows is in %d training rows", len(test), len(train))
    return shared


def _pair(train: TableView, a: int, test: TableView, b: int) -> str:
    return f"train {train.domain_name[a]}/{train.path(a)}, {test.split[b]} {test.domain_name[b]}/{test.path(b)}"


def _images(view: TableView) -> dict[Any, int]:
    """{digest: its first row}."""
    first: dict[Any, int] = {}
    for row, digest in enumerate(view.digests(np.arange(len(view)))):
        first.setdefault(digest, row)
    return first


def _identities(view: TableView) -> dict[Any, int]:
    """{(dataset, pid): its first row}."""
    rows = np.flatnonzero(view.pid >= 0)
    keys = zip(view.domain_name[rows].tolist(), view.pid[rows].tolist(), strict=True)
    first: dict[Any, int] = {}
    for key, row in zip(keys, rows.tolist(), strict=True):
        first.setdefault(key, row)
    return first


def _shared(left: dict[Any, int], right: dict[Any, int]) -> list[tuple[int, int]]:
    """[(left row, right row)] of the keys that both sides hold, by right row."""
    return [(left[key], row) for key, row in right.items() if key in left]


def _shared_cameras(train: TableView, test: TableView) -> dict[str, list[int]]:
    sides = [
        set(zip(view.domain_name[view.camid >= 0].tolist(), view.camid[view.camid >= 0].tolist(), strict=True))
        for view in (train, test)
    ]
    shared: dict[str, list[int]] = {}
    for name, camera in sorted(sides[0] & sides[1]):
        shared.setdefault(name, []).append(camera)
    return shared
