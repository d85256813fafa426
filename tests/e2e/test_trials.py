"""RegDB's way end to end: one command trains a run per division, one scores them all, one makes the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import evaluate, report
from reid_dist import methods
from reid_dist.errors import UserError
from reid_dist.runs import Run
from tests.e2e.job import Job
from tests.worlds import small_tables

WORDS = ["jobs.train", "rle/tiny", "trials=[0,1]", "name=divisions", "training.max_steps=3", "training.epochs=1"]


def test_two_divisions_from_training_to_page(tmp_path: Path) -> None:
    small_tables(tmp_path, methods.load_recipe("rle/tiny"))
    words = [*WORDS, f"data.root={tmp_path}", f"output={tmp_path}/runs"]
    code, record, err = Job(*words).finish()
    assert code == 0, err[-3000:]
    assert [Path(one["run"]).name for one in record["runs"]] == ["divisions-trial-0", "divisions-trial-1"]
    cards = [Run.read(one["run"]).card() for one in record["runs"]]
    assert [card["recipe"]["data"]["trial"] for card in cards] == [0, 1]
    assert all(card["status"] == "done" for card in cards)

    group = f"{tmp_path}/runs/divisions"
    for more in (["protocol=regdb-visible-to-thermal"], ["protocol=regdb-thermal-to-visible", "model.fusion=0.0"]):
        mean = evaluate.main([group, "trials=[0,1]", *more, "model.flip_test=true"])
        own = [json.loads((Path(row["run"]) / row["stored"]).read_text())["record"] for row in mean["trials"]]
        assert [one["trial"] for one in own] == [0, 1]
        assert mean["mAP"] == pytest.approx((own[0]["mAP"] + own[1]["mAP"]) / 2)
        assert mean["mAP_std"] == pytest.approx(abs(own[0]["mAP"] - own[1]["mAP"]) / 2)
        assert mean["protocol"] in more[0]
    with pytest.raises(UserError, match="this one was trained on trial 0"):
        evaluate.main([f"{group}-trial-0", "data.trial=1"])
    page = Path(report.main([group, "trials=[0,1]"])["report"]).read_text()
    assert "regdb-thermal-to-visible: mean of 2" in page
    assert "regdb-visible-to-thermal: mean of 2" in page
    assert "What the augmentation does" in page
