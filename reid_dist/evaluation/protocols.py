"""Evaluation protocols as data (datasets.md 6.1 to 6.6 and 6.8): who is asked, what is searched, what is taken out, how
often.

A protocol selects rows from the plain columns of a test set (`Items`) and names the `Scoring`; no protocol is a code
path of its own. Where sources disagree, the default is the one of datasets.md section 7 and the other stands beside it
under its own name. Cameras are the numbers that the protocol is written on: 1 to 6 for SYSU-MM01, as in its folder
names; any base elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from reid_dist.evaluation.pipeline import Options, rank_pair
from reid_dist.evaluation.ranking import JUNK, Labels, Scoring, average_records
from reid_dist.evaluation.similarity import Array, EvaluationError

PLAIN = Scoring()
COLUMNS = ("split", "pid", "camid", "modality", "tracklet", "path", "trial", "captions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Columns of a test set, N rows: images, or one row per tracklet (`tracklets`). A column that is absent is None."""

    split: np.ndarray  # str: "query" | "gallery" | "test" (either side; the modality decides); others are passed over
    pid: np.ndarray  # int64
    camid: np.ndarray | None = None  # int64, -1 = none
    modality: np.ndarray | None = None  # str "rgb" | "ir"
    tracklet: np.ndarray | None = None  # int64
    path: np.ndarray | None = None  # str; the draws of SYSU and LLCM go through sorted paths
    trial: np.ndarray | None = None  # int64: rows of one of several train/test splits
    captions: np.ndarray | None = None  # int64: number of captions of the row's image

    def __post_init__(self) -> None:
        for name in COLUMNS:
            values = getattr(self, name)
            if values is not None and np.shape(values) != (len(self.pid),):
                raise EvaluationError(f"column {name}: shape {np.shape(values)}, expected ({len(self.pid)},) like pid")

    def column(self, name: str, protocol: str) -> np.ndarray:
        """A column that the protocol cannot do without. Raises EvaluationError when it is absent."""
        values: np.ndarray | None = getattr(self, name)
        if values is None:
            raise EvaluationError(f"protocol {protocol} needs the column {name!r}")
        return values

    def labels(self, rows: np.ndarray) -> Labels:
        """Ids and cameras of some rows."""
        return Labels(self.pid, self.camid).take(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The rule by which rows are query or gallery."""

    splits: tuple[str, ...]
    modality: str | None = None
    cameras: tuple[int, ...] | None = None  # in the order in which draws visit them
    captions: bool = False  # each caption of a row is an item of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One way to score, as data."""

    name: str
    task: Literal["image", "video", "text", "visible-infrared"]
    query: Side
    gallery: Side
    scoring: Scoring = PLAIN
    trials: int = 1
    trial_rule: Literal["single", "column", "draw"] = "single"  # rows of that trial; gallery drawn per trial
    shots: int = 0  # images drawn per (id, camera) of the gallery; 0 = all
    both_ways: bool = False  # each trial is asked in both directions, averaged inside the trial first (VIPeR)
    beside: str = ""  # another convention's protocol over the same items, whose record stands beside this one's
    own_model_per_trial: bool = False  # RegDB: each trial has its own training identities
    source: str = "datasets.md"


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of `Items` on either side, and for captions which of the row's captions (else 0)."""

    query: np.ndarray  # int64 [Q]
    gallery: np.ndarray  # int64 [G]
    query_part: np.ndarray
    gallery_part: np.ndarray


QUERY, GALLERY = Side(splits=("query",)), Side(splits=("gallery",))
BOTH = Side(splits=("query", "gallery"))
MARKET_RULE = Scoring(same_camera=True)
INFRARED = Side(splits=("query", "test"), modality="ir", cameras=(3, 6))
SYSU_RULE = Scoring(camera_pairs=((3, 2),), unique_ids=True)  # cameras 2 and 3 look into the same room
TEXT, IMAGES = Side(splits=("query", "test"), captions=True), Side(splits=("gallery", "test"))
LLCM_CAMERAS = {"rgb": tuple(range(1, 10)), "ir": (1, 2, 4, 5, 6, 7, 8, 9)}  # there is no near-infrared camera 3


def _sysu(mode: str, cameras: tuple[int, ...], shots: int) -> Protocol:
    name = f"sysu-{mode}-{'single' if shots == 1 else 'multi'}-shot"
    gallery = Side(splits=("gallery", "test"), modality="rgb", cameras=cameras)
    return Protocol(
        name=name, task="visible-infrared", query=INFRARED, gallery=gallery, scoring=SYSU_RULE, trials=10,
        trial_rule="draw", shots=shots, source="datasets.md 6.4",
    )  # fmt: skip


def _cross(name: str, query: str, gallery: str, **more: Any) -> Protocol:
    cameras = LLCM_CAMERAS if name.startswith("llcm") else {"rgb": None, "ir": None}
    return Protocol(
        name=name, task="visible-infrared", trials=10,
        query=Side(splits=("query", "test"), modality=query, cameras=cameras[query]),
        gallery=Side(splits=("gallery", "test"), modality=gallery, cameras=cameras[gallery]), **more,
    )  # fmt: skip


def _small_set(name: str, query: Side, gallery: Side, both_ways: bool = False) -> Protocol:
    return Protocol(
        name=name, task="image", query=query, gallery=gallery, scoring=MARKET_RULE, trials=10, trial_rule="column",
        both_ways=both_ways, source="datasets.md 1.7",
    )  # fmt: skip


def _directions(dataset: str, rgb: str, ir: str) -> tuple[tuple[str, str, str], ...]:
    return (f"{dataset}-{rgb}-to-{ir}", "rgb", "ir"), (f"{dataset}-{ir}-to-{rgb}", "ir", "rgb")


_ALL = (
    Protocol(name="image", task="image", query=QUERY, gallery=GALLERY, scoring=MARKET_RULE, source="datasets.md 6.1"),
    Protocol(
        name="cuhk03-classic", task="image", query=Side(splits=("query", "gallery", "test")),
        gallery=Side(splits=("query", "gallery", "test")), scoring=Scoring(same_camera=True, gallery_draws=10),
        trials=20, trial_rule="column", source="datasets.md 6.2",
    ),
    Protocol(
        name="video", task="video", query=QUERY, gallery=BOTH, scoring=MARKET_RULE, beside="video-without-queries",
        source="datasets.md 6.3, official",
    ),
    Protocol(
        name="video-without-queries", task="video", query=QUERY, gallery=GALLERY, scoring=MARKET_RULE,
        source="datasets.md 6.3, torchreid",
    ),
    Protocol(
        name="video-ten-splits", task="video", query=QUERY, gallery=GALLERY, scoring=MARKET_RULE, trials=10,
        trial_rule="column", source="datasets.md 2.3, iLIDS-VID",
    ),
    *(_sysu(mode, cams, n) for mode, cams in (("all", (1, 2, 4, 5)), ("indoor", (1, 2))) for n in (1, 10)),
    *(
        _cross(name, query, gallery, trial_rule="column", own_model_per_trial=True, source="datasets.md 6.5")
        for name, query, gallery in _directions("regdb", "visible", "thermal")
    ),
    *(
        _cross(name, query, gallery, trial_rule="draw", shots=1, scoring=Scoring(same_camera=True, unique_ids=True),
               source="datasets.md 6.6")
        for name, query, gallery in _directions("llcm", "visible", "infrared")
    ),
    Protocol(name="text-to-image", task="text", query=TEXT, gallery=IMAGES, source="datasets.md 6.8"),
    Protocol(
        name="image-to-text", task="text", query=Side(splits=("query", "test")),
        gallery=Side(splits=("gallery", "test"), captions=True), source="datasets.md 6.8, reversed",
    ),
    _small_set("ten-splits", QUERY, GALLERY),
    _small_set("ten-splits-reversed", GALLERY, QUERY),
    _small_set("ten-splits-both-ways", QUERY, GALLERY, both_ways=True),
)  # fmt: skip
PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _ALL}


def get(name: str) -> Protocol:
    """The protocol of that name. Raises EvaluationError that lists all names."""
    if name not in PROTOCOLS:
        raise EvaluationError(f"no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def select(
    protocol: Protocol,
    items: Items,
    trial: int = 0,
    permutations: Mapping[tuple[int, int], np.ndarray] | None = None,
) -> Selection:
    """Rows of one trial. Junk (pid -1) is on neither side.

    Args:
        trial: for `trial_rule="column"` an index into the sorted trial numbers; for "draw" the seed, from 0. Where
            trials are asked both ways, 2k is trial k and 2k + 1 the same with the sides exchanged.
        permutations: {(camera, pid): int [trials, n] of 1-based file numbers}: SYSU's published `rand_perm_cam`, used
            instead of the seeded draws (datasets.md 6.4 rule a).
    Raises EvaluationError: a column or side that is missing, a trial that is not there.
    """
    use = np.asarray(items.pid) != JUNK
    query, gallery = protocol.query, protocol.gallery
    if protocol.both_ways:
        trial, reverse = divmod(trial, 2)
        query, gallery = (gallery, query) if reverse else (query, gallery)
    if protocol.trial_rule == "column":
        use &= _trial_rows(protocol, items, trial)
    elif not 0 <= trial < protocol.trials:
        raise EvaluationError(f"protocol {protocol.name} has trials 0 to {protocol.trials - 1}, not {trial}")
    sides = []
    for role, side in (("query", query), ("gallery", gallery)):
        rows = _rows(protocol, items, side, use)
        if role == "gallery" and protocol.shots:
            rows = _draw(protocol, items, rows, trial, permutations)
        rows, part = (
            _captions(items, rows) if side.captions and items.captions is not None else (rows, np.zeros_like(rows))
        )
        if not len(rows):
            modality = f" of modality {side.modality!r}" if side.modality else ""
            place = f" in trial {trial}" if protocol.trial_rule == "column" else ""
            raise EvaluationError(
                f"protocol {protocol.name}: no {role} rows{modality} among splits {side.splits}{place}"
            )
        sides.append((rows, part))
    (asked, asked_part), (searched, searched_part) = sides
    return Selection(asked, searched, asked_part, searched_part)


def evaluate(
    protocol: Protocol,
    items: Items,
    features: Mapping[str, Array],
    *,
    options: Options | None = None,
    weights: Mapping[str, float] | None = None,
    permutations: Mapping[tuple[int, int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """The protocol's record, averaged over its trials, from named embeddings [N, D] with one row per item.

    Raises EvaluationError as `select` and `rank_pair`.
    """
    records = []
    for trial in range(num_retrievals(protocol, items)):
        chosen = select(protocol, items, trial, permutations)
        query, gallery = ({name: x[rows] for name, x in features.items()} for rows in (chosen.query, chosen.gallery))
        labels = items.labels(chosen.query), items.labels(chosen.gallery)
        sums = rank_pair(query, gallery, *labels, protocol.scoring, options or Options(), weights=weights)
        records.append(sums.record())
    return {"protocol": protocol.name, **combined(protocol, records)}


def combined(protocol: Protocol, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record from those of all retrievals, in the order of `select`'s trials."""
    return dict(records[0]) if len(records) == 1 else average_records(records, 2 if protocol.both_ways else 1)


def num_retrievals(protocol: Protocol, items: Items) -> int:
    """How many trials `select` has: `num_trials`, twice where both directions are asked."""
    return num_trials(protocol, items) * (2 if protocol.both_ways else 1)


def num_trials(protocol: Protocol, items: Items) -> int:
    """Trials that these items hold: the protocol's number, or as many as the trial column names."""
    if protocol.trial_rule != "column":
        return protocol.trials
    return 1 if items.trial is None else len(np.unique(items.trial))


def check_trial(protocol: Protocol, trial: int, model_trial: int | None) -> None:
    """Refuse a model that was trained on another trial's identities (RegDB: they overlap the test ids of this one)."""
    if protocol.own_model_per_trial and model_trial != trial:
        raise EvaluationError(
            f"protocol {protocol.name}: trial {trial} must be scored by the model of trial {trial}, this one was "
            f"trained on trial {model_trial}, whose training identities overlap these test identities"
        )


def tracklets(items: Items) -> tuple[Items, list[np.ndarray]]:
    """Items with one row per tracklet of a side and trial (in order of first appearance), and each one's frame rows."""
    number = items.column("tracklet", "video")
    none = np.full(len(number), -1)
    names = ("split", "trial", "pid", "camid")
    keys = [none if (x := getattr(items, name)) is None else np.asarray(x) for name in names]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, key in enumerate(zip(*(x.tolist() for x in (*keys, number)), strict=True)):
        groups.setdefault(key, []).append(i)
    first = np.array([rows[0] for rows in groups.values()])
    columns: dict[str, Any] = {
        name: None if (x := getattr(items, name)) is None else np.asarray(x)[first] for name in COLUMNS
    }
    return Items(**columns), [np.array(rows) for rows in groups.values()]


def trial_index(lines: Iterable[str], name: str = "trial file") -> tuple[list[str], np.ndarray]:
    """(relative paths, labels int64) of a RegDB trial file: lines `<path> <label>`. Raises EvaluationError with the
    line."""
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or not fields[1].isdigit():
            raise EvaluationError(f"{name}, line {number}: expected '<path> <label>', got {line.strip()!r}")
        paths.append(fields[0])
        labels.append(int(fields[1]))
    return paths, np.array(labels, np.int64)


def _trial_rows(protocol: Protocol, items: Items, trial: int) -> np.ndarray:
    if items.trial is None:
        if trial:
            raise EvaluationError(f"protocol {protocol.name} needs the column 'trial' for more than one trial")
        return np.ones(len(items.pid), bool)
    trials = np.unique(items.trial)
    if not 0 <= trial < len(trials):
        raise EvaluationError(f"the trial column holds {len(trials)} trials, trial {trial} was asked for")
    chosen: np.ndarray = np.asarray(items.trial) == trials[trial]
    return chosen


def _rows(protocol: Protocol, items: Items, side: Side, use: np.ndarray) -> np.ndarray:
    mask = use & np.isin(items.split, side.splits)
    if side.modality is not None:
        mask = mask & (items.column("modality", protocol.name) == side.modality)
    if side.cameras is None:
        return np.flatnonzero(mask)
    cameras = items.column("camid", protocol.name)
    rows = np.flatnonzero(mask & np.isin(cameras, side.cameras))
    visit = {camera: place for place, camera in enumerate(side.cameras)}
    paths = np.zeros(len(items.pid), str) if items.path is None else items.path

    def place(row: int) -> tuple[int, int, str, int]:
        return int(items.pid[row]), visit[int(cameras[row])], str(paths[row]), row

    return np.array(sorted(rows.tolist(), key=place), np.int64)


def _draw(
    protocol: Protocol,
    items: Items,
    rows: np.ndarray,
    trial: int,
    permutations: Mapping[tuple[int, int], np.ndarray] | None,
) -> np.ndarray:
    """`shots` rows per (id, camera); rows come by id, camera in visiting order, path.

    CPython's own generator, one call per folder, must not be vectorised: each pick uses up a variable number of words.
    """
    rng = random.Random(trial)  # the published selection draws like this
    cameras = items.column("camid", protocol.name)
    folders: dict[tuple[int, int], list[int]] = {}
    for row in rows.tolist():
        folders.setdefault((int(cameras[row]), int(items.pid[row])), []).append(row)
    drawn: list[int] = []
    for key, files in folders.items():
        if permutations is None:
            drawn += [rng.choice(files)] if protocol.shots == 1 else rng.sample(files, min(protocol.shots, len(files)))
            continue
        if key not in permutations or trial >= len(permutations[key]):
            raise EvaluationError(f"the permutation file has no trial {trial} for camera {key[0]}, id {key[1]}")
        picks = np.asarray(permutations[key][trial][: protocol.shots], np.int64) - 1
        if picks.min() < 0 or picks.max() >= len(files):
            raise EvaluationError(f"camera {key[0]}, id {key[1]}: permutation beyond its {len(files)} images")
        drawn += [files[i] for i in picks]
    return np.array(drawn, np.int64)


def _captions(items: Items, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row once per caption, and the caption's number."""
    counts = np.asarray(items.captions)[rows]
    part = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(rows, counts), part
