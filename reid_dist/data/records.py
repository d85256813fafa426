"""What a parser returns and a table stores: one record per image or frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from reid_dist.errors import UserError


class DatasetError(UserError):
    """A dataset tree that breaks its layout; the message names the file and what was expected of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image (or video frame) of a dataset.

    `split` is "train", "val", "query" or "gallery"; text sets use "train", "val" and "test" (a test row is gallery by
    its image and query by its captions). Cameras count from 0; None says that the set has none, and takes no part in
    camera rules. SYSU-MM01 and LLCM keep the camera numbers (from 1) that their protocols are written on.

    A set with several train/test divisions (RegDB, the four small ones, iLIDS-VID, CUHK03 classic) still has one record
    per image: `trials` holds the row's split in each division ("" where it takes no part), and `split` is that of the
    first ("unused" for none). An image that is part of a file (a box of a scene, a cell of a .mat) has a path
    `<file>#<member>`.
    """

    path: str  # relative POSIX path below the dataset root, original spelling
    split: str
    pid: int
    camid: int | None = None
    modality: str = "rgb"  # "rgb" | "ir"
    tracklet: int | None = None
    frame: int | None = None
    domain: str = ""  # the dataset's name
    captions: tuple[str, ...] = ()
    trials: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedDataset:
    """A whole dataset, in the order of its layout (bytewise by path, or the annotation file's own)."""

    name: str
    records: tuple[Record, ...]
    ignored: tuple[str, ...] = ()  # housekeeping files that were passed over (Thumbs.db, .DS_Store, ...)
    warnings: tuple[str, ...] = ()  # published counts that do not match, and the like
    notes: dict[str, str] = field(
        default_factory=dict
    )  # facts a reader of the table wants (variant loaded, annotation file)

    def counts(self) -> dict[str, dict[str, int]]:
        """{split: {"ids", "images", "cameras", "captions"}}."""
        splits = dict.fromkeys(r.split for r in self.records)
        return {split: self.count_of([r for r in self.records if r.split == split]) for split in splits}

    @staticmethod
    def count_of(rows: Sequence[Record]) -> dict[str, int]:
        """{"ids", "images", "cameras", "captions"} of some rows, and their "tracklets" where there are any."""
        numbers = {
            "ids": len({r.pid for r in rows}),
            "images": len(rows),
            "cameras": len({r.camid for r in rows if r.camid is not None}),
            "captions": sum(len(r.captions) for r in rows),
        }
        tracklets = len({r.tracklet for r in rows if r.tracklet is not None})
        return numbers | ({"tracklets": tracklets} if tracklets else {})


def first_split(trials: Sequence[str]) -> str:
    """`Record.split` of a row with these trials."""
    return trials[0] or "unused"


def label_map(pids: Sequence[int]) -> dict[int, int]:
    """{pid: class label 0..n-1} over the sorted set (an unordered set gives every rank other labels)."""
    return {pid: label for label, pid in enumerate(sorted(set(pids)))}
