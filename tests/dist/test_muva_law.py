"""MUVA's two trainers against vectors of the authors' own runs, by one worker and by several; and the law on a tiny model."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reid_dist.evaluation.ranking import Labels, Scoring, rank_features
from reid_dist.methods.muva.masks import MaskRow, write_masks
from reid_dist.runs import Run
from reid_dist.training.checkpoint import newest
from tests.dist.cells import train_recipe
from tests.dist.muva_cells import (
    encode_golden,
    golden_recipe,
    golden_view,
    law_view,
    train_golden,
    train_golden_skewed,
    train_law,
    train_until_killed_between_stages,
)
from tests.dist.test_methods_law import assert_same_losses, mapping_of, start_run
from tests.golden import cases, load
from tests.pool import Pool
from tests.unit.muva_names import our_name, tensors

FP32 = 1e-4


def close(actual: Any, expected: Any, rtol: float, atol: float) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=rtol, atol=atol)


def store_golden_masks(root: Path, c: dict[str, Any]) -> None:
    """The case's masks as a side table; the grid is the tower's."""
    view, stride = golden_view(c), c["in_stride"]
    patch = c["w_img_patch_embed_weight"].shape[-1]
    grid = tuple((size - patch) // stride + 1 for size in c["in_image_u8"].shape[2:])
    digests = view.digests(np.arange(len(view)))
    rows = [MaskRow(digest, mask == 0) for digest, mask in zip(digests, c["in_pseudo_mask"], strict=True)]
    write_masks(str(root), "golden", rows, grid, "golden vector")  # type: ignore[arg-type]


# (workers, ZeRO stage, micro-batches, slices): the batches of the vectors are even, so two workers also take skewed slices.
LAYOUTS = [(1, 0, 1, "even"), (2, 1, 1, "even"), (2, 1, 1, "skewed"), (2, 0, 1, "skewed")]
CELLS = pytest.mark.parametrize(("world", "stage", "pieces", "slices"), LAYOUTS)
MORE = pytest.mark.parametrize(
    ("world", "stage", "pieces", "slices"), [*LAYOUTS, (2, 1, 3, "skewed"), (4, 2, 1, "even")]
)


def run_golden(
    pool: Pool, case: Path, root: Path, kind: str, world: int, stage: int, pieces: int, slices: str
) -> list[dict[str, Any]]:
    """The ranks' results of a golden trainer case."""
    train = train_golden_skewed if slices == "skewed" else train_golden
    ranks = pool.run(train, world, case, str(root), kind, stage, pieces)
    if slices == "skewed":
        assert len(set(ranks[0]["rows"])) == world, "the slices were to differ"
    return ranks


@CELLS
@cases("muva", "prompt_stage_training")
def test_prompt_trainer(
    pool: Pool, tmp_path: Path, case: Path, world: int, stage: int, pieces: int, slices: str
) -> None:
    c = load(case)
    store_golden_masks(tmp_path, c)
    ranks = run_golden(pool, case, tmp_path, "prompt", world, stage, pieces, slices)
    for result in ranks:
        close(result["state"]["centroids"], c["out_centroids"], 2e-3, 1e-4)
        losses = [record["contrast"] for record in result["losses"]]
        np.testing.assert_allclose(losses, c["out_loss"], rtol=2e-3)
    close(ranks[0]["weights"]["prompts.context"], c["out_prompt_ctx"], 0, 2e-5 + 0.02 * c["in_base_lr"])
    for name, value in tensors(c).items():  # nothing but the prompts has moved
        if name != "prompt_ctx":
            close(ranks[0]["weights"][our_name(name)], value, 0, 0)


@MORE
@cases("muva", "finetune_stage_training")
def test_finetune_trainer(
    pool: Pool, tmp_path: Path, case: Path, world: int, stage: int, pieces: int, slices: str
) -> None:
    """Four workers on batches of three or four rows (or three pieces of two workers' rows) include empty slices."""
    c = load(case)
    store_golden_masks(tmp_path, c)
    ranks = run_golden(pool, case, tmp_path, "finetune", world, stage, pieces, slices)
    near = {"rtol": 5e-3, "atol": 1e-4}
    for result in ranks:
        close(result["state"]["text"], c["out_text_prototypes"], **near)
        close(torch.stack(result["starts"]), c["out_memory_start"], **near)
        close(torch.stack(result["ends"]), c["out_memory_end"], **near)
        for ours, theirs in {
            "id": "id",
            "memory": "memory",
            "i2t": "i2t",
            "mask": "mask",
            "dice": "dice",
            "loss": "total",
        }.items():
            close([record[ours] for record in result["losses"]], c[f"out_loss_{theirs}"].tolist(), **near)
    weights = ranks[0]["weights"]
    skipped = ("text_prototypes", "memory", "loss", "eval", "cmc", "map")
    final = {name: value for name, value in tensors(c, "out_").items() if not name.startswith(skipped)}
    assert len(final) >= 15
    for name, value in final.items():
        close(weights[our_name(name)], value, **near)
    recipe = golden_recipe(c, str(tmp_path), "finetune", 0)
    feat, queries = encode_golden(c, recipe, weights), c["in_num_query"]
    feat /= np.linalg.norm(feat, axis=1, keepdims=True)
    close(feat, c["out_eval_feat"] / np.linalg.norm(c["out_eval_feat"], axis=1, keepdims=True), **near)
    sides = [Labels(c["in_eval_pid"][part], c["in_eval_cam"][part]) for part in (slice(queries), slice(queries, None))]
    sums = rank_features(feat[:queries], feat[queries:], *sides, Scoring(same_camera=True))
    np.testing.assert_allclose(sums.cmc(len(c["out_cmc"])), c["out_cmc"], rtol=1e-6)
    assert sums.record()["mAP"] == pytest.approx(c["out_map"], rel=5e-3)


@pytest.fixture(scope="module")
def law_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with the tiny view's masks."""
    root = tmp_path_factory.mktemp("law")
    view, rng = law_view(), np.random.default_rng(2)
    rows = [MaskRow(digest, rng.random((3, 8)) < 0.4) for digest in view.digests(np.arange(len(view)))]
    write_masks(str(root), "law", rows, (4, 2), "test")
    return str(root)


@pytest.fixture(scope="module")
def alone(pool: Pool, law_root: str) -> dict[str, Any]:
    return pool.run(train_law, 1, law_root, {})[0]


TERMS = {0: ("contrast",), 1: ("id", "memory", "i2t", "mask", "dice")}


def assert_same(ranks: list[dict[str, Any]], reference: dict[str, Any], start: int = 0) -> None:
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"], "ranks record different numbers"
    ours, theirs = ranks[0]["losses"], reference["losses"][start:]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a["step"], a["stage"], a["lr"], a["rows"]) == (b["step"], b["stage"], b["lr"], b["rows"])
        for term in (*TERMS[int(a["stage"])], "loss"):
            assert a[term] == pytest.approx(b[term], rel=FP32), (a["step"], term)
    for name, value in reference["snapshot"].model.items():
        if value.is_floating_point():
            close(ranks[0]["snapshot"].model[name], value, 1e-3, 1e-4)
    close(ranks[0]["snapshot"].method["memory"], reference["snapshot"].method["memory"], 1e-3, 1e-4)


@pytest.mark.parametrize(
    ("world", "stage", "pieces"),
    [(1, 1, 1), (2, 0, 1), (2, 1, 1), (2, 2, 1), (2, 3, 1), (4, 1, 1), (1, 0, 4), (2, 2, 2)],
)
def test_workers_stages_and_pieces(
    pool: Pool, law_root: str, alone: dict[str, Any], world: int, stage: int, pieces: int
) -> None:
    assert len(alone["losses"]) >= 12
    result = pool.run(train_law, world, law_root, {"zero_stage": stage, "micro_batches": pieces})
    assert_same(result, alone)


@pytest.mark.parametrize(("save", "resume"), [((2, 1), (4, 2)), ((2, 3), (1, 0))])
def test_stop_anywhere_and_resume_with_other_workers(
    pool: Pool, law_root: str, alone: dict[str, Any], save: tuple[int, int], resume: tuple[int, int]
) -> None:
    first_of_two = sum(record["stage"] == 0 for record in alone["losses"])
    for stop in (
        first_of_two - 1,
        first_of_two,
        first_of_two + 2,
    ):  # inside stage 1, at its end, inside an epoch of stage 2
        first = pool.run(train_law, save[0], law_root, {"zero_stage": save[1]}, None, None, stop)[0]
        assert not first["finished"]
        second = pool.run(train_law, resume[0], law_root, {"zero_stage": resume[1]}, None, first["snapshot"])
        assert_same(second, alone, start=len(first["losses"]))


def test_bf16_follows_fp32(pool: Pool, law_root: str, alone: dict[str, Any]) -> None:
    result = pool.run(train_law, 2, law_root, {"zero_stage": 1, "precision": "bf16"})[0]
    assert len(result["losses"]) == len(alone["losses"])
    assert all(np.isfinite(record["loss"]) for record in result["losses"])
    for a, b in zip(result["losses"], alone["losses"], strict=True):
        for term in ("contrast",) if a["stage"] == 0 else ("mask", "id"):
            assert a[term] == pytest.approx(b[term], rel=0.1), (a["step"], term)


def test_a_stage_1_snapshot_seeds_stage_2(pool: Pool, law_root: str, alone: dict[str, Any]) -> None:
    """What `init: run:URI` does: only weights pass, and stage 2 alone goes the way of the whole run."""
    prompts = pool.run(train_law, 1, law_root, {}, {"stages": ("prompts",)})[0]
    assert prompts["finished"]
    seed = prompts["snapshot"]
    import dataclasses

    from reid_dist.training.checkpoint import Progress

    fresh = dataclasses.replace(seed, progress=Progress(), optimizer={}, method={})
    second = pool.run(train_law, 1, law_root, {}, {"stages": ("finetune",)}, fresh)[0]
    whole = [record for record in alone["losses"] if record["stage"] == 1]
    assert [r["loss"] for r in second["losses"]] == pytest.approx([r["loss"] for r in whole], rel=1e-6)


def test_killed_between_the_stages(pool: Pool, tmp_path: Path) -> None:
    """SIGKILL after stage 1's checkpoint; two workers at ZeRO-2 take it up from storage and give what one gives undisturbed."""
    mapping = mapping_of("muva/tiny", tmp_path, str(tmp_path / "runs"), num_workers=1, zero_stage=1, log_every=1)
    alone = pool.run(train_recipe, 1, mapping)[0]["losses"]
    uri = start_run(mapping)
    process = multiprocessing.get_context("spawn").Process(
        target=train_until_killed_between_stages, args=(mapping, uri)
    )
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    found = newest(Run.read(uri))
    assert found is not None
    boundary = sum(record["stage"] == 0 for record in alone)
    assert (found.progress.stage, found.progress.stage_done, found.progress.step) == (0, True, boundary)
    assert found.model["prompts.people"].all(), "the checkpoint says whose prompts it holds"
    rest = pool.run(train_recipe, 2, {**mapping, "training": {**mapping["training"], "zero_stage": 2}}, uri)[0][
        "losses"
    ]
    assert [record["step"] for record in rest] == list(range(boundary + 1, len(alone) + 1))
    assert_same_losses([*alone[:boundary], *rest], alone)
