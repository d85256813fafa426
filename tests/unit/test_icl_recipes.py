"""ICL's shipped recipes: which there are, and that each is planned on tables of the four sets' own layouts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from jobs.train import train
from reid_dist import methods
from reid_dist.config import DataConfig
from reid_dist.data.captions import CaptionGroups, caption_digest, caption_pairs, write_caption_groups
from reid_dist.data.store import open_view
from reid_dist.methods.icl.config import Config
from reid_dist.methods.icl.noise import checked, draw_permutation, store_permutation
from tests.worlds import small_table

SETS = ("cuhk-pedes", "icfg-pedes", "rstpreid", "ufine6926")
SYNTHETIC = "synthetic-cuhk-pedes"
PEOPLE, IMAGES = 10, 2


def test_recipes() -> None:
    names = methods.recipes("icl")
    assert len(names) >= 29
    for name in names:
        loaded = methods.load_recipe(name)
        assert isinstance(loaded.model, Config)
    for table in ("cuhk_pedes", "icfg_pedes", "rstpreid", "ufine6926"):
        rde, icl = (methods.load_recipe(f"icl/{kind}_{table}") for kind in ("rde", "icl"))
        assert icl.model.groups
        assert dataclasses.replace(icl.model, groups=()) == rde.model  # one key between them
        assert methods.load_recipe(f"icl/icl_{table}_pretrained").model.pretrained
    for rate in (20, 50, 80):
        for table in ("cuhk_pedes", "icfg_pedes", "rstpreid"):
            noisy = methods.load_recipe(f"icl/rde_{table}_noise{rate}")
            assert noisy.model.noise.endswith(f"-0.{rate // 10}")
            assert noisy.data.val_fraction == 0.0  # held-out captions would not be in the permutation
    assert methods.load_recipe("icl/rde_ufine6926").model.text_length == 168
    crossed = methods.load_recipe("icl/icl_cuhk_pedes_to_rstpreid")
    assert (crossed.data.train, crossed.data.test) == (("cuhk-pedes",), ("rstpreid",))
    assert dataclasses.replace(Config(), loss="sdm").pair_loss == "sdm"
    assert dataclasses.replace(Config(), loss="sdm", groups=("g",)).pair_loss == "tal"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small tables under the published names, with the side tables and permutations that recipes name."""
    place = tmp_path_factory.mktemp("sets")
    for table in (*SETS, SYNTHETIC):
        held_out = {} if table in ("icfg-pedes", "ufine6926") else {"num_val": 3}  # those two have no val split
        small_table(place, table, num_train=PEOPLE, num_test=4, images_per_id=IMAGES, **held_out)
        view = open_view(DataConfig(root=str(place)), (table,), ("train",))
        pairs = caption_pairs(view)
        images = view.digests(np.arange(len(view)))
        captions = [(images[row], view.captions[row][number]) for row, number in pairs.tolist()]
        rows = [CaptionGroups(image, caption_digest(text), ((text,),)) for image, text in captions]
        short = "synthetic" if table == SYNTHETIC else table
        write_caption_groups(str(place), f"{short}-groups", rows, "test")
        for rate in (0.2, 0.5, 0.8):
            permutation = checked(draw_permutation(len(pairs), rate, 1), len(pairs), table)
            store_permutation(str(place), f"{short}-{rate}", permutation)
    return place


@pytest.mark.parametrize("name", methods.recipes("icl"))
def test_every_recipe_is_planned(root: Path, name: str) -> None:
    loaded = methods.load_recipe(name, [f"data.root={root}", f"output={root}"])
    plan = train(loaded, plan_only=True)["plan"]
    (table,) = loaded.data.train
    assert set(plan["tables"]) == {table}
    assert plan["train_ids"] == PEOPLE - round(PEOPLE * loaded.data.val_fraction)
    pairs = plan["train_ids"] * IMAGES * (1 if table == "icfg-pedes" else 2)  # captions of an image
    steps = loaded.training.epochs * math.ceil(pairs / loaded.training.global_batch)
    assert plan["steps"] == min(steps, loaded.training.max_steps or steps)
