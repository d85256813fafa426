"""MUVA's data against the authors' vectors: transforms, joint flip, samplers, merged sources."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reid_dist.data import layouts
from reid_dist.data.samplers import IdentityPlan, compose_identity_batches
from reid_dist.data.transforms import ImageTransform
from reid_dist.evaluation.domains import Source, join
from reid_dist.methods.muva.config import Config
from reid_dist.methods.muva.images import flips, grounded_batch, paired_flip, transform_of
from reid_dist.methods.muva.predictor import additive
from reid_dist.storage import open_store
from tests.golden import cases, load


@cases("muva", "masked_flip")
def test_image_and_mask_flip_together(case: Path) -> None:
    c = load(case)
    flipped = bool(flips([c["in_draw"]], c["in_prob"])[0])
    assert flipped == c["out_flipped"]
    image, visible = paired_flip(torch.as_tensor(c["in_image"]), c["in_mask"] == 0, tuple(c["in_grid"]), flipped)
    np.testing.assert_array_equal(image, c["out_image"])
    np.testing.assert_array_equal(additive(torch.as_tensor(visible.copy())), c["out_mask"])


@cases("muva", "image_preprocess")
def test_image_preprocessing(case: Path) -> None:
    c = load(case)
    config = Config(image_size=tuple(c["in_size"].tolist()))
    for train in (True, False):
        transform = transform_of(config, train)
        assert transform.mean == tuple(c["in_mean"].tolist())
        assert transform.std == tuple(c["in_std"].tolist())
        np.testing.assert_allclose(
            transform.apply(c["in_image_u8"]), c["out_train" if train else "out_eval"], rtol=0, atol=1e-6
        )


@cases("muva", "grounded_batch")
def test_grounded_batch(case: Path) -> None:
    c = load(case)
    config = Config(image_size=tuple(c["in_size"].tolist()), flip=c["in_flip_prob"])
    flipped = flips(c["in_flip_draw"], config.flip)
    transform = transform_of(config, train=c["in_is_train"])
    image, visible = grounded_batch(
        list(c["in_image_u8"]), c["in_mask"] == 0, transform, tuple(c["in_grid"].tolist()), flipped
    )
    np.testing.assert_allclose(image, c["out_image"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(additive(visible), c["out_mask"])


class Recorded:
    """A generator that gives recorded unit draws and corners."""

    def __init__(self, units: np.ndarray, corners: np.ndarray) -> None:
        self.units, self.corners = iter(np.atleast_1d(units).tolist()), iter(np.atleast_1d(corners).tolist())

    def random(self) -> float:
        return next(self.units)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.units)

    def integers(self, low: int, high: int) -> int:
        value = next(self.corners)
        assert low <= value < high
        return value


@cases("muva", "random_erasing")
def test_random_erasing(case: Path) -> None:
    """The authors' optional erasing is the shared pipeline's, with a linear aspect ratio; MUVA's recipes leave it off."""
    c = load(case)
    image, aspect = c["in_image"], c["in_min_aspect"]
    transform = ImageTransform(
        size=image.shape[1:], erase=c["in_prob"], erase_area=tuple(c["in_area_range"].tolist()),
        erase_ratio=(aspect, 1 / aspect), erase_log_ratio=False, erase_attempts=100, erase_fill=tuple(c["in_fill"].tolist()),
    )  # fmt: skip
    rng = Recorded(c["in_unit_draws"], c["in_corner_draws"])
    draws = transform.draw(rng)  # type: ignore[arg-type]
    black = np.zeros((*image.shape[1:], 3), np.uint8)
    plain, erased = transform.apply(black).numpy(), transform.apply(black, draws).numpy()
    result = np.where(
        erased != plain, erased, image
    )  # the vector's image is no picture of bytes: erase the same places
    np.testing.assert_allclose(result, c["out_image"], rtol=0, atol=1e-7)
    assert next(rng.units, None) is None
    assert next(rng.corners, None) is None


def original_draws(
    labels: np.ndarray, batch: int, instances: int, seed: int, ascending: bool
) -> tuple[dict[int, list[int]], list[list[int]]]:
    """The draws of methods/muva.md section 5.3 with CPython's and NumPy's legacy generators: orders and selections."""
    random.seed(seed)
    np.random.seed(seed)
    pids = sorted(set(labels.tolist())) if ascending else list(dict.fromkeys(labels.tolist()))
    orders: dict[int, list[int]] = {}
    for pid in pids:
        rows = np.flatnonzero(labels == pid).tolist()
        if len(rows) < instances:
            rows = np.random.choice(rows, size=instances, replace=True).tolist()
        random.shuffle(rows)
        orders[pid] = rows
    left = {pid: len(order) // instances for pid, order in orders.items()}
    available, selections = list(pids), []
    while len(available) >= batch // instances:
        selections.append(random.sample(available, batch // instances))
        for pid in selections[-1]:
            left[pid] -= 1
            if not left[pid]:
                available.remove(pid)
    return orders, selections


@cases("muva", "identity_sampler", "prompt_stage_sampler")
def test_batches_composed_from_the_original_draws(case: Path) -> None:
    c = load(case)
    ascending = case.stem.startswith("prompt")  # the first stage visits identities in ascending order
    draws = original_draws(c["in_labels"], c["in_batch_size"], c["in_num_instances"], c["in_seed"], ascending)
    index = compose_identity_batches(*draws, c["in_num_instances"])
    np.testing.assert_array_equal(index, c["out_index"])


def plans(c: dict[str, Any]) -> Iterator[IdentityPlan]:
    for seed in range(5):
        yield IdentityPlan(c["in_labels"], c["in_batch_size"], c["in_num_instances"], seed)


@cases("muva", "identity_sampler", "prompt_stage_sampler")
def test_our_plans_keep_the_invariants(case: Path) -> None:
    """Section 5.3: P distinct identities x K rows; no image twice unless its identity has fewer than K."""
    c = load(case)
    labels, k = c["in_labels"], c["in_num_instances"]
    p = c["in_batch_size"] // k
    for plan in plans(c):
        if "out_reported_length" in c:
            assert plan.estimate() == c["out_reported_length"]
        else:
            assert abs(max(1, plan.steps(0)) - c["out_num_batches"]) <= 1
        for step in range(plan.steps(0)):
            groups = labels[plan.batch(0, step)[0]].reshape(p, k)
            assert (groups == groups[:, :1]).all()
            assert len(set(groups[:, 0].tolist())) == p
        items, uses = np.unique(plan.items(0), return_counts=True)
        short = np.bincount(labels)[labels[items]] < k
        assert (uses[~short] == 1).all()
        groups_left = {pid: max(1, n // k) for pid, n in enumerate(np.bincount(labels)) if n}
        for pid in labels[plan.items(0)].reshape(-1, k)[:, 0].tolist():
            groups_left[pid] -= 1
        assert sum(left > 0 for left in groups_left.values()) <= p - 1


SETS = {
    "market1501": ("market-1501", "Market1501"),
    "dukemtmc": ("dukemtmc-reid", "dukemtmcreid"),
    "msmt17": ("msmt17", "MSMT17"),
    "cuhk03np": ("cuhk03-np", "cuhk03np"),
}


@cases("muva", "multi_source_index")
def test_merged_sources(case: Path, tmp_path: Path) -> None:
    """Paths, labels and cameras as the authors merge them, but for one thing: they shift cameras by the number of cameras
    seen, so that two sources may share one; we shift by the largest number. Both shifts are undone here."""
    c = load(case)
    for name in c["in_files"].tolist():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    there = {name: where for name, where in SETS.items() if (tmp_path / where[1]).exists()}
    parsed = {
        name: layouts.get(ours).parse(open_store(str(tmp_path / folder))) for name, (ours, folder) in there.items()
    }
    names = c["in_sources"].tolist()
    train = {name: [r for r in parsed[name].records if r.split == "train"] for name in names}
    sources = [
        Source(SETS[n][0], np.array([r.pid for r in train[n]]), np.array([r.camid for r in train[n]])) for n in names
    ]
    joined = join(sources)
    seen = [len(set(source.camid.tolist())) for source in sources]
    offset = dict(zip(range(len(names)), np.cumsum([0, *seen[:-1]]).tolist(), strict=True))
    camid = [int(cam) - joined.camera_offset[d] + offset[d] for cam, d in zip(joined.camid, joined.domain, strict=True)]
    paths = [f"{SETS[name][1]}/{record.path}" for name in names for record in train[name]]
    order = np.argsort(paths)
    assert [paths[i] for i in order] == c["out_train_path"].tolist()
    np.testing.assert_array_equal(joined.label[order], c["out_train_pid"])
    np.testing.assert_array_equal(np.array(camid)[order], c["out_train_cam"])
    assert len(set(joined.label.tolist())) == c["out_num_train_pids"]
    assert len(set(camid)) == c["out_num_train_cams"]
    both = set(zip(joined.domain.tolist(), joined.camid.tolist(), strict=True))
    assert len({cam for _, cam in both}) == len(both)  # ours: no camera of one source stands for another's
    records = parsed[c["in_target"]].records
    for split in ("query", "gallery"):
        found = sorted((r for r in records if r.split == split), key=lambda r: r.path)
        assert [f"{SETS[c['in_target']][1]}/{r.path}" for r in found] == np.atleast_1d(c[f"out_{split}_path"]).tolist()
        shift = 0 if c["in_target"] != "msmt17" else 1 + max(r.pid for r in records if r.split == "train")
        assert [r.pid - shift + c["out_num_train_pids"] for r in found] == c[f"out_{split}_pid"].tolist()
        assert [r.camid + sum(seen) for r in found] == c[f"out_{split}_cam"].tolist()
