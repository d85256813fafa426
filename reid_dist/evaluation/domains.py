"""Domain generalisation splits as data (datasets.md 6.7).

The literature's "protocol 1/2/3" labels conflict, so splits have names of our own. Sources are joined in the listed
order; each adds its number of train ids and of cameras to the offsets of the next, so that no id or camera of one
stands for another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reid_dist.evaluation.similarity import EvaluationError

MARKET, DUKE, MSMT, CUHK03 = "market-1501", "dukemtmc-reid", "msmt17", "cuhk03-np"
CUHK02, CUHK_SYSU = "cuhk02", "cuhk-sysu"
FOUR = (MARKET, DUKE, MSMT, CUHK03)
SMALL = ("prid2011", "grid", "viper", "i-lids")


@dataclass(frozen=True, slots=True)
class DomainSplit:
    """Train on `sources`, test on `target`."""

    name: str  # "<family>/<target>", for single-source "<family>/<source>/<target>"
    sources: tuple[str, ...]
    target: str
    images: Literal["train", "all"]  # of the sources: train split, or train + query + gallery
    protocol: str = "image"


def _family(
    name: str, targets: Sequence[str], sources: Sequence[str], images: Literal["train", "all"]
) -> list[DomainSplit]:
    return [DomainSplit(f"{name}/{t}", tuple(s for s in sources if s != t), t, images) for t in targets]


def _small(name: str, sources: tuple[str, ...]) -> list[DomainSplit]:
    both = {"viper": "ten-splits-both-ways"}
    return [DomainSplit(f"{name}/{t}", sources, t, "all", both.get(t, "ten-splits")) for t in SMALL]


_ALL = [
    *(DomainSplit(f"ss/{a}/{b}", (a,), b, "train") for a in FOUR for b in FOUR if a != b),
    *_family("loo4-train", FOUR, FOUR, "train"),
    *_family("loo4-all", FOUR, FOUR, "all"),
    *_small("small4", (MARKET, DUKE, CUHK02, CUHK03, CUHK_SYSU)),
    *_small("small4-noduke", (MARKET, CUHK02, CUHK03, CUHK_SYSU)),
    *_family("loo-cs-train", (MARKET, MSMT, CUHK03), (MARKET, MSMT, CUHK03, CUHK_SYSU), "train"),
    *_family("loo-cs-all", (MARKET, MSMT, CUHK03), (MARKET, MSMT, CUHK03, CUHK_SYSU), "all"),
]
DOMAIN_SPLITS: Mapping[str, DomainSplit] = {split.name: split for split in _ALL}


def get(name: str) -> DomainSplit:
    """The split of that name. Raises EvaluationError that lists the family's names, or all families."""
    if name not in DOMAIN_SPLITS:
        family = name.split("/")[0]
        near = [n for n in DOMAIN_SPLITS if n.split("/")[0] == family] or sorted(
            {n.split("/")[0] for n in DOMAIN_SPLITS}
        )
        raise EvaluationError(f"no domain split {name!r}; there are {', '.join(near)}")
    return DOMAIN_SPLITS[name]


@dataclass(frozen=True, slots=True)
class Source:
    """Labels of one source's training images, N rows."""

    name: str
    pid: np.ndarray  # int64; ids of one source that share a number but not a person must be separated before
    camid: np.ndarray  # int64, -1 = the set has no cameras


@dataclass(frozen=True, slots=True)
class Joined:
    """Sources as one training set, rows in source order."""

    label: np.ndarray  # int64, 0 to the number of all ids
    camid: np.ndarray  # int64; a set without cameras gets one pseudo camera of its own, for samplers only
    domain: np.ndarray  # int64, place of the source
    id_offset: tuple[int, ...]
    camera_offset: tuple[int, ...]


def join(sources: Sequence[Source]) -> Joined:
    """Relabel each source from 0 (sorted ids) and shift by the ids and cameras of those before it.

    Negative ids (Market's junk) and, in Market, id 0 (distractors, no person) are refused: they are no identities.
    Raises EvaluationError: no sources, such an id, or a source without images.
    """
    labels, cameras, domains, id_offsets, camera_offsets = [], [], [], [], []
    num_ids = num_cameras = 0
    for place, source in enumerate(sources):
        bad = source.pid < (1 if source.name == MARKET else 0)
        if not len(source.pid) or bad.any():
            what = "has no images" if not len(source.pid) else f"holds pid {source.pid[bad][0]}, which is no identity"
            raise EvaluationError(f"source {source.name} {what}: drop junk and distractors before training")
        id_offsets.append(num_ids)
        camera_offsets.append(num_cameras)
        ids, label = np.unique(source.pid, return_inverse=True)
        labels.append(label + num_ids)
        cameras.append(np.where(source.camid < 0, 0, source.camid) + num_cameras)
        domains.append(np.full(len(label), place))
        num_ids += len(ids)
        num_cameras += max(int(source.camid.max()) + 1, 1)
    if not labels:
        raise EvaluationError("no sources to join")
    return Joined(
        np.concatenate(labels),
        np.concatenate(cameras),
        np.concatenate(domains),
        tuple(id_offsets),
        tuple(camera_offsets),
    )
