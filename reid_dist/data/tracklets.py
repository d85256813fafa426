"""Which rows of a view make a tracklet. A tracklet is named by any of its rows (evaluation names it by the first)."""

from __future__ import annotations

import numpy as np

from reid_dist.data.store import TableView


def tracklets_of(view: TableView, rows: np.ndarray) -> list[np.ndarray]:
    """All rows, in frame order, of the tracklet of each of `rows`: same domain, id, camera and tracklet number."""
    keys = np.stack([view.domain, view.pid, view.camid, np.asarray(view.tracklet)], axis=1)
    frame, found = np.asarray(view.frame), []
    for row in rows.tolist():
        members = np.flatnonzero((keys == keys[row]).all(axis=1))
        found.append(members[np.argsort(frame[members], kind="stable")])
    return found
