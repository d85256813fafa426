"""Generation jobs with vLLM itself and the committed small model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reid_dist.config import DataConfig
from reid_dist.data.store import TableView, open_view
from reid_dist.methods.muva.masks import open_masks
from tests.e2e.job import Job
from tests.processes import MARK, assert_all_ended, new_mark
from tests.worlds import small_table

pytestmark = pytest.mark.timeout(1200)  # several engines start one after another, each some 10 s on a quiet machine
TABLE = "synthetic-cuhk-pedes"
IMAGES = 80


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    small_table(folder, TABLE, num_train=IMAGES // 2, images_per_id=2)
    return folder


def train_view(root: str) -> TableView:
    return open_view(DataConfig(root=root), (TABLE,), ("train",))


class Generation(Job):
    """A generation job whose processes can be told."""

    def __init__(self, kind: str, root: str, *words: str, environment: Mapping[str, str] | None = None) -> None:
        self.mark = new_mark()
        if environment is None:
            environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        super().__init__(
            "jobs.generate", kind, TABLE, f"root={root}", "shard=4", "parallel=4", *words,
            environment={**environment, MARK: self.mark},
        )  # fmt: skip

    def done(self) -> dict[str, Any]:
        """The record of a job that succeeded and left no process behind."""
        code, record, err = self.finish(400)
        assert code == 0, err[-3000:]
        assert_all_ended(self.mark)
        return record


def test_masks_come_from_engines_on_ray(root: Path) -> None:
    masks = Generation("masks", str(root), "limit=40", "engines=2").done()
    assert (masks["images"] + masks["error_rows"], masks["stages"]["ground"]["units"]) == (40, 120)
    view = train_view(str(root)).select(np.arange(40))
    found = open_masks(DataConfig(root=str(root)), (f"{TABLE}-masks",), view, (16, 8), ("head", "upper", "legs"))
    assert found.visible(np.arange(40)).any(axis=2).all(), "every part has patches"
