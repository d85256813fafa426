"""RegDB's divisions: each run trains on its own, and its model is refused for another (synthetic-regdb, packed)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.evaluate import trial_of
from reid_dist import methods
from reid_dist.config import Recipe
from reid_dist.data.store import TableView, open_view
from reid_dist.errors import UserError
from reid_dist.evaluation.distributed.retrieval import plan_retrieval
from reid_dist.evaluation.protocols import get
from reid_dist.methods.rle.method import RLEStage
from reid_dist.training.worker import open_data
from tests.worlds import small_table

TABLE = "synthetic-regdb"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regdb")
    small_table(folder, TABLE)
    return folder


def recipe(root: Path, trial: int) -> Recipe:
    return methods.load_recipe("rle/tiny", [f"data.root={root}", f"data.trial={trial}"])


def people(view: TableView, split: str) -> set[int]:
    return set(view.pid[view.split == split].tolist())


def test_each_division_trains_and_tests_on_its_own_people(root: Path) -> None:
    seen = []
    for trial in (0, 1):
        chosen = recipe(root, trial)
        data, whole = open_data(chosen), open_view(chosen.data, (TABLE,))
        stage = RLEStage(chosen, data.train)
        trained = set(data.train.pid[np.concatenate([stage.rows.visible, stage.rows.infrared])].tolist())
        assert trained == people(whole, "train")
        assert stage.rows.classes == 8
        assert not trained & people(whole, "test")
        for protocol in ("regdb-visible-to-thermal", "regdb-thermal-to-visible"):
            retrieval = plan_retrieval(get(protocol), open_view(chosen.data, (TABLE,)), trial=trial)
            (only,) = retrieval.trials
            asked = retrieval.items.pid[only.selection.query]
            assert set(asked.tolist()) == people(whole, "test")
            kinds = retrieval.items.modality
            assert kinds is not None
            modalities = set(kinds[only.selection.query].tolist()), set(kinds[only.selection.gallery].tolist())
            assert modalities == (({"rgb"}, {"ir"}) if protocol.endswith("thermal") else ({"ir"}, {"rgb"}))
        seen.append(trained)
    assert seen[0] != seen[1]


def test_a_model_of_another_division_is_refused(root: Path) -> None:
    chosen, protocol = recipe(root, 3), get("regdb-visible-to-thermal")
    view = open_view(chosen.data, (TABLE,))
    assert trial_of(protocol, view, chosen.data, (TABLE,), None) == 3
    assert trial_of(protocol, view, chosen.data, (TABLE,), 3) == 3
    with pytest.raises(
        UserError, match="trial 0 must be scored by the model of trial 0, this one was trained on trial 3"
    ):
        trial_of(protocol, view, chosen.data, (TABLE,), 0)


def test_a_division_that_is_not_there_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="no trial 10"):
        open_data(recipe(root, 10))
