"""SYSU-MM01 and LLCM with RLE: ten trials from one extraction, and the scores that ten extractions would give."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reid_dist import methods
from reid_dist.data.store import TableView, open_view
from reid_dist.evaluation.distributed.retrieval import encode_all, plan_retrieval, score
from reid_dist.evaluation.pipeline import Options
from reid_dist.evaluation.protocols import get
from reid_dist.methods.rle import METHOD
from reid_dist.methods.rle.config import Config
from reid_dist.methods.rle.model import build_network
from reid_dist.methods.spec import EvalSide
from tests.worlds import small_table

TINY = Config(arch="resnet-tiny", weights="", image_size=(48, 24), flip_test=True)
SETS = {
    "synthetic-sysu-mm01": ("sysu-all-single-shot", "sysu-all-multi-shot", "sysu-indoor-single-shot"),
    "synthetic-llcm": ("llcm-visible-to-infrared", "llcm-infrared-to-visible"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocols")
    small_table(folder, "synthetic-sysu-mm01", num_val=3, num_train=3, images_per_id=4)
    small_table(folder, "synthetic-llcm", num_train=3, images_per_id=4)
    return folder


def searched(root: Path, name: str) -> TableView:
    recipe = methods.load_recipe("rle/tiny", [f"data.root={root}", f"data.test=[{name}]"])
    return open_view(recipe.data, recipe.data.test, ("test", "query", "gallery"))


class Extraction:
    """RLE's features of a side; counts how often each row is encoded."""

    def __init__(self, view: TableView) -> None:
        torch.manual_seed(0)
        self.model, self.view, self.seen = build_network(TINY, 0).eval(), view, Counter[int]()

    def __call__(self, side: EvalSide) -> dict[str, Tensor]:
        self.seen.update(side.rows.tolist())
        with torch.no_grad():
            batch = METHOD.eval_batch(TINY, self.view, side, np.arange(len(side.rows)))
            return METHOD.encode(self.model, batch)


@pytest.mark.parametrize(("name", "protocol"), [(name, protocol) for name, some in SETS.items() for protocol in some])
def test_ten_trials_from_one_extraction(name: str, protocol: str, root: Path) -> None:
    view = searched(root, name)
    retrieval, extract = plan_retrieval(get(protocol), view), Extraction(view)
    features = encode_all(retrieval, extract)
    assert len(retrieval.trials) == 10
    assert set(extract.seen.values()) == {1}
    needed = {int(row) for trial in retrieval.trials for side in (trial.selection.query, trial.selection.gallery)
              for row in retrieval.rows[side]}  # fmt: skip
    assert set(extract.seen) == needed
    together, _ = score(retrieval, features, METHOD.similarity, Options())
    apart = []
    for trial in retrieval.trials:
        alone = dataclasses.replace(retrieval, trials=(trial,))
        apart.append(score(alone, encode_all(alone, Extraction(view)), METHOD.similarity, Options())[0])
    for key in ("rank1", "mAP", "mINP"):
        assert together[key] == pytest.approx(np.mean([one[key] for one in apart]), abs=1e-12)
    assert together["rank1_std"] == pytest.approx(np.std([one["rank1"] for one in apart]), abs=1e-12)


def test_galleries_of_trials_differ(root: Path) -> None:
    """Else the test above could not tell one trial from ten."""
    for name, protocols in SETS.items():
        retrieval = plan_retrieval(get(protocols[0]), searched(root, name))
        assert len({tuple(trial.selection.gallery) for trial in retrieval.trials}) > 3
