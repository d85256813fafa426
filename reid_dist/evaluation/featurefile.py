"""Anybody's features in one file, so that users of other libraries can be scored here by one line.

npz, or Parquet with the same columns: `feat` [N, D] (in Parquet a list per row), `pid` [N], `camid` [N] (-1 = no
camera), `split` [N] of "query" / "gallery" ("test": either side, the protocol decides; "train", "val", "unused" are
passed over); where the protocol needs them `modality` [N] of "rgb" / "ir", `tracklet` [N], `trial` [N], `path` [N];
optional `id` [N], a key that must not come twice on a side of a trial (a sampler's padded duplicates are found by it).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from reid_dist.evaluation.protocols import Items, Protocol, tracklets
from reid_dist.evaluation.similarity import CHUNK, EvaluationError

ALLOWED = {"split": ("query", "gallery", "test", "train", "val", "unused"), "modality": ("rgb", "ir")}
WHOLE = ("pid", "camid", "tracklet", "trial")
TEXT = ("split", "modality", "path", "id")


def read_features(path: str | Path, protocol: Protocol) -> tuple[Items, np.ndarray]:
    """(columns, features float32 [N, D]) of a feature file.

    Raises EvaluationError, naming file and column: unreadable file, missing or ragged column, wrong type or value, a
    key twice.
    """
    known = read_columns(path, ["feat", "pid", "split", *_needs(protocol)], f"protocol {protocol.name}")
    feat = known.pop("feat")
    known.pop("id", None)
    both = int((known["split"] == "test").sum())
    if protocol.task == "text" and both:
        raise EvaluationError(
            f"{path}: protocol {protocol.name} asks with one kind of row and finds another, so split must say query or gallery; "
            f"{both} rows say test, which is both"
        )
    return Items(**known), feat


def read_columns(path: str | Path, needed: Sequence[str], reader: str) -> dict[str, np.ndarray]:
    """The columns of a feature file that have a meaning here, checked; `feat` float32 [N, D], the others [N].

    `needed` must be there; `reader` says for whom. Raises EvaluationError as `read_features`.
    """
    path = Path(path)
    columns = _parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _npz(path)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise EvaluationError(
            f"{path}: {reader} needs the columns {list(needed)}; missing {missing}, there are {sorted(columns)}"
        )
    feat = columns["feat"]
    if feat.ndim != 2 or 0 in feat.shape or feat.dtype.kind != "f":
        raise EvaluationError(f"{path}: column feat has shape {feat.shape} and type {feat.dtype}, expected real [N, D]")
    for start in range(0, len(feat), CHUNK):
        bad = np.flatnonzero(~np.isfinite(feat[start : start + CHUNK]).all(axis=1))
        if len(bad):
            raise EvaluationError(f"{path}: column feat, row {start + bad[0]}: not a finite number (NaN or infinity)")
    known = {name: _checked(path, name, columns[name], len(feat)) for name in (*WHOLE, *TEXT) if name in columns}
    if "split" in known:
        _unique(path, known)
    return {"feat": feat.astype(np.float32, copy=False), **known}


def pool_tracklets(items: Items, feat: np.ndarray) -> tuple[Items, np.ndarray]:
    """Frames as tracklets: one row per tracklet of a side and trial, its feature [D] the mean over its frames."""
    pooled, frames = tracklets(items)
    return pooled, np.stack([feat[rows].mean(axis=0, dtype=np.float64) for rows in frames]).astype(np.float32)


def _needs(protocol: Protocol) -> list[str]:
    sides = (protocol.query, protocol.gallery)
    return [
        *(["camid"] if protocol.scoring.same_camera or protocol.scoring.camera_pairs or protocol.shots else []),
        *(["modality"] if any(side.modality for side in sides) else []),
        *(["trial"] if protocol.trial_rule == "column" else []),
        *(["path"] if protocol.shots else []),
    ]


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such file") from None
    except (OSError, ValueError, BadZipFile, TypeError) as error:  # TypeError: a lone .npy array is no archive
        raise EvaluationError(f"{path}: not an npz file of plain arrays ({error})") from error


def _parquet(path: Path) -> dict[str, np.ndarray]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such file") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise EvaluationError(f"{path}: not a Parquet file ({error})") from error
    columns: dict[str, np.ndarray] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if column.null_count:
            raise EvaluationError(f"{path}: column {name} has {column.null_count} empty cells")
        if (
            pa.types.is_list(column.type)
            or pa.types.is_large_list(column.type)
            or pa.types.is_fixed_size_list(column.type)
        ):
            columns[name] = _rows(path, name, column)
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns


def _rows(path: Path, name: str, column: Any) -> np.ndarray:
    """A list column as [N, D]. Raises EvaluationError when its rows differ in length."""
    from pyarrow import compute

    widths = np.unique(compute.list_value_length(column).to_numpy(zero_copy_only=False))
    if len(widths) != 1:
        raise EvaluationError(f"{path}: column {name} has rows of different dimensions {widths.tolist()}")
    flat: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), int(widths[0]))


def _checked(path: Path, name: str, values: np.ndarray, count: int) -> np.ndarray:
    if values.shape != (count,):
        raise EvaluationError(f"{path}: column {name} has shape {values.shape}, feat has {count} rows")
    if name in WHOLE:
        if values.dtype.kind not in "iu":
            raise EvaluationError(f"{path}: column {name} has type {values.dtype}, expected whole numbers")
        return values.astype(np.int64)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    texts = values.astype(str)
    if name in ALLOWED:
        strange = np.unique(texts[~np.isin(texts, ALLOWED[name])])
        if len(strange):
            raise EvaluationError(f"{path}: column {name} holds {strange[:5].tolist()}, expected {list(ALLOWED[name])}")
    return texts


def _unique(path: Path, known: dict[str, np.ndarray]) -> None:
    if "id" not in known:
        return
    trial = known.get("trial", np.zeros(len(known["id"]), np.int64))
    keys = np.char.add(np.char.add(known["split"], "/"), np.char.add(np.char.add(trial.astype(str), "/"), known["id"]))
    found, counts = np.unique(keys, return_counts=True)
    if (counts > 1).any():
        twice = str(found[counts > 1][0]).split("/", 2)[2]
        raise EvaluationError(
            f"{path}: id {twice!r} comes twice on one side ({int((counts > 1).sum())} such ids): drop padded duplicates"
        )
