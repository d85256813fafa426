"""Part masks: boxes to patches, the side table, the authors' pickles (also malicious ones), and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reid_dist.config import DataConfig
from reid_dist.data.synthetic import world_for
from reid_dist.errors import UserError
from reid_dist.methods import muva
from reid_dist.methods.muva.__main__ import main
from reid_dist.methods.muva.boxes import band, boxes_to_patches, rasterise, usable
from reid_dist.methods.muva.exact import exact_masks
from reid_dist.methods.muva.mask_pickle import masks_of_pickle, read_mask_pickle
from reid_dist.methods.muva.masks import MaskRow, flip_patches, open_masks, write_masks
from tests.unit.muva_names import ArrayView

GRID = (16, 8)


def view_of(count: int = 4, pid: int = 3) -> ArrayView:
    rng = np.random.default_rng(0)
    return ArrayView(rng.integers(0, 255, (count, 3, 32, 16), dtype=np.uint8), np.full(count, pid))


def test_patches_whose_centre_lies_in_a_box() -> None:
    # Patch (r, c) of a 4 x 2 grid has its centre at ((c + .5) / 2, (r + .5) / 4).
    assert rasterise([(0, 0, 0.5, 0.5)], (4, 2)).tolist() == [
        [True, False],
        [True, False],
        [False, False],
        [False, False],
    ]
    assert rasterise([(0.3, 0.4, 0.7, 0.6)], (4, 2)).sum() == 1  # holds no centre: the patch at its own centre
    assert rasterise([(0.3, 0.4, 0.7, 0.6)], (4, 2))[2, 1]
    union = rasterise([(0, 0, 1, 0.25), (0, 0.75, 1, 1)], (4, 2))
    assert union.tolist() == [[True, True], [False, False], [False, False], [True, True]]


def test_boxes_that_say_nothing_are_rejected() -> None:
    assert usable((-0.2, 0.1, 0.5, 1.4), GRID) == (0.0, 0.1, 0.5, 1.0)
    for bad in [
        (0, 0, 1, 1),
        (0.1, 0.1, 0.1, 0.9),
        (0.5, 0.5, 0.51, 0.51),
        (0.9, 0.1, 0.1, 0.9),
        (0, 0, 1),
        (0, 0, 1, np.nan),
    ]:
        assert usable(bad, GRID) is None


def test_calibration_by_fixed_bands() -> None:
    """methods/muva.md section 5.4: rows 0-3, 3-9, 8-16 of 16 for a missing part, and for all when head lies below legs."""
    head, upper, legs = (0.3, 0.0, 0.7, 0.2), (0.1, 0.2, 0.9, 0.55), (0.2, 0.5, 0.8, 1.0)
    good = boxes_to_patches({"head": [head], "upper": [upper], "legs": [legs]}, GRID)
    assert good.fallback == ()
    assert good.visible.reshape(3, *GRID)[0, 0].tolist() == [False] * 2 + [True] * 4 + [False] * 2
    partly = boxes_to_patches({"head": [head], "upper": [(0, 0, 1, 1)], "legs": [legs]}, GRID)
    assert partly.fallback == ("upper",)
    assert (partly.visible[0] == good.visible[0]).all()
    assert np.flatnonzero(partly.visible[1].reshape(GRID).all(axis=1)).tolist() == list(range(3, 9))
    turned = boxes_to_patches({"head": [legs], "upper": [upper], "legs": [head]}, GRID)
    assert turned.fallback == ("head", "upper", "legs")
    assert [int(np.flatnonzero(mask.reshape(GRID).any(axis=1))[0]) for mask in turned.visible] == [0, 3, 8]
    assert np.flatnonzero(band("legs", (8, 4)).all(axis=1)).tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="unknown parts"):
        boxes_to_patches({"arms": [head]}, GRID)


def test_side_table_keeps_masks_by_image(tmp_path: Path) -> None:
    view, rng = view_of(), np.random.default_rng(1)
    masks = rng.random((4, 3, 128)) < 0.3
    digests = view.digests(np.arange(4))
    rows = [
        MaskRow(digest, mask, {"head": [[0, 0, 0.5, 0.5]]}, ["legs"])
        for digest, mask in zip(digests, masks, strict=True)
    ]
    write_masks(str(tmp_path), "m", reversed(rows), GRID, "test")  # order in the table is nobody's business
    data = DataConfig(root=str(tmp_path))
    whole = open_masks(data, ["m"], view, GRID, ("head", "upper", "legs"))
    np.testing.assert_array_equal(whole.visible(np.array([2, 0, 0])), masks[[2, 0, 0]])
    some = open_masks(data, ["m"], view, GRID, ("legs", "head"))
    np.testing.assert_array_equal(some.visible(np.arange(4)), masks[:, [0, 2]])
    bands = open_masks(data, ["bands"], view, GRID, ("head",))
    assert bands.visible(np.arange(4)).reshape(4, *GRID)[:, :3].all()
    np.testing.assert_array_equal(flip_patches(flip_patches(masks, GRID), GRID), masks)
    assert flip_patches(np.arange(4)[None], (2, 2)).tolist() == [[1, 0, 3, 2]]


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    view, data = view_of(), DataConfig(root=str(tmp_path))
    digests, mask = view.digests(np.arange(4)), np.zeros((3, 128), dtype=bool)
    write_masks(str(tmp_path), "m", [MaskRow(d, mask) for d in digests[:3]], GRID, "test")
    parts = ("head", "upper", "legs")
    with pytest.raises(UserError, match=r"1 of 4 training images have no part mask in m, first .*0003_c1_3.jpg"):
        open_masks(data, ["m"], view, GRID, parts)
    with pytest.raises(UserError, match="masks of 16 x 8 patches, the recipe's images have 8 x 4"):
        open_masks(data, ["m"], view, (8, 4), parts)
    with pytest.raises(UserError, match=r"model.masks is empty: .*model.parts=\[\]"):
        open_masks(data, [], view, GRID, parts)
    with pytest.raises(UserError, match="no side table 'other'"):
        open_masks(data, ["other"], view, GRID, parts)
    with pytest.raises(UserError, match="expected bool"):
        write_masks(str(tmp_path), "x", [MaskRow("a", np.zeros((3, 32), dtype=bool))], GRID, "test")
    with pytest.raises(UserError, match="two different masks"):
        write_masks(str(tmp_path), "x", [MaskRow("a", mask), MaskRow("a", ~mask)], GRID, "test")
    with pytest.raises(UserError, match="no masks to write"):
        write_masks(str(tmp_path), "x", [], GRID, "test")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8"])
def test_official_pickles_of_every_protocol(protocol: int, dtype: str) -> None:
    """Written by the real pickle with real arrays, C and Fortran order, 2 and 3 axes."""
    view = view_of()
    masks = np.random.default_rng(5).random((4, 3, 128)) < 0.4
    additive = np.where(masks, 0, -np.inf).astype(dtype)
    names = [Path(view.path(row)).name for row in range(4)]
    arrays = [
        additive[0],
        np.asfortranarray(additive[1]),
        additive[2].reshape(3, *GRID),
        np.where(masks[3], 0, -1e4).astype(dtype),
    ]
    content = pickle.dumps(dict(zip(names, arrays, strict=True)), protocol=protocol)
    rows = list(masks_of_pickle(content, "file.pkl", view, GRID))
    assert [row.digest for row in rows] == view.digests(np.arange(4))
    np.testing.assert_array_equal([row.visible for row in rows], masks)


class Evil:
    """Runs a command when it is unpickled by an ordinary reader."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def evil_pickles(marker: Path) -> list[bytes]:
    touch = f"touch {marker}"
    good = np.zeros((3, 128), np.float32)
    crafted = [
        {"a.jpg": Evil(os.system, touch)},
        {"a.jpg": good, "b.jpg": [Evil(eval, f"open({str(marker)!r}, 'w')")]},
        {Evil(exec, f"open({str(marker)!r}, 'w')"): good},
        {"a.jpg": Evil(np.ndarray, (10**9,))},
        {"a.jpg": np.array([Evil(os.system, touch)], dtype=object)},
        {"a.jpg": np.array([(1, 2.0)], dtype=[("x", "i4"), ("y", "f4")])},
    ]
    by_hand = [
        b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        b"cnumpy\nload\n(S'/etc/passwd'\ntR.",
        b"not a pickle",
        b"",
    ]
    return [pickle.dumps(content, protocol=2) for content in crafted] + by_hand


def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for content in evil_pickles(marker):
        with pytest.raises(UserError, match=r"file\.pkl"):
            read_mask_pickle(content, "file.pkl")
        assert not marker.exists()
    pickle.Unpickler(io.BytesIO(evil_pickles(marker)[0])).load()
    assert marker.exists()  # so the first one does run in an ordinary reader


def test_an_array_that_lies_about_its_size_is_refused() -> None:
    class Liar:
        def __reduce__(self) -> tuple[Any, ...]:
            rebuild, args, state = np.zeros((3, 128), np.float32).__reduce__()
            return rebuild, args, (state[0], (3, 10**9), *state[2:])

    with pytest.raises(UserError, match="an array of shape"):
        read_mask_pickle(pickle.dumps({"a.jpg": Liar()}), "file.pkl")


def test_mask_files_of_another_kind_are_refused() -> None:
    view = view_of(2)
    names = [Path(view.path(row)).name for row in range(2)]
    good = np.where(np.eye(3, 128) > 0, 0, -np.inf)

    def read(content: Any) -> None:
        list(masks_of_pickle(pickle.dumps(content), "f.pkl", view, GRID))

    with pytest.raises(UserError, match="mask values"):
        read(dict.fromkeys(names, np.eye(3, 128)))  # 0/1 masks: as an attention term they block nothing
    with pytest.raises(UserError, match="of type bool"):
        read(dict.fromkeys(names, np.ones((3, 128), dtype=bool)))
    with pytest.raises(UserError, match=r"mask of shape \(3, 64\), expected \(3, 128\)"):
        read(dict.fromkeys(names, good[:, :64]))
    with pytest.raises(UserError, match="1 images are not in it, first"):
        read({names[0]: good})
    with pytest.raises(UserError, match="expected a dict"):
        read([good])
    with pytest.raises(UserError, match="occur twice under different folders"):
        read({names[0]: good, f"sub/{names[0]}": good})
    with pytest.raises(UserError, match="not a file name with an array"):
        read({names[0]: 3.0})


def test_exact_masks_of_a_synthetic_world_and_the_command(tmp_path: Path) -> None:
    options = {"num_train": 4, "num_test": 3, "num_distractors": 0, "images_per_id": 2}
    world = world_for("market-1501", **options)
    rows = list(exact_masks(world, "market-1501", (8, 4)))
    assert len(rows) == len({row.digest for row in rows}) == 8
    shares = np.mean([row.visible for row in rows], axis=0).reshape(3, 8, 4)
    middle = (shares * np.arange(8)[None, :, None]).sum(axis=(1, 2)) / shares.sum(axis=(1, 2))
    assert middle[0] < middle[1] < middle[2]  # head above upper body above legs
    words = [f"{key}={value}" for key, value in options.items()]
    shape = ["image_size=[64,32]", "patch=8", "stride=8"]
    record = main(["draw-masks", "market-1501", "name=exact", f"root={tmp_path}", *shape, *words])
    assert record["images"] == 8
    assert record["grid"] == [8, 4]
    for wrong in (
        ["import-masks", "f.pkl"],
        ["draw-masks", "market-1501", "name=a", "root=b", "image_size=[8,8]"],
        ["x", "y"],
    ):
        with pytest.raises(UserError, match="usage"):
            main(wrong)


def test_the_command_imports_an_official_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A packed table, a pickle of its training images, the side table that a recipe then opens; a bad file is exit 2."""
    from reid_dist.data.records import Record
    from reid_dist.data.store import open_view
    from tests.tables import jpeg, write_table

    splits, pids = ["train", "train", "query", "gallery", "gallery", "gallery"], [1, 2, 3, 3, 0, -1]
    records = [
        Record(path=f"{split}/{n:04d}_c1.jpg", split=split, pid=pid, camid=0, domain="market-1501")
        for n, (split, pid) in enumerate(zip(splits, pids, strict=True), 1)
    ]
    write_table(str(tmp_path), "market-1501", records, [jpeg(n) for n in range(6)], tmp_path / "raw")
    masks = np.random.default_rng(3).random((2, 3, 128)) < 0.5
    additive = np.where(masks, 0, -np.inf).astype(np.float32)
    file = tmp_path / "masks.pkl"
    file.write_bytes(pickle.dumps({"0001_c1.jpg": additive[0], "0002_c1.jpg": additive[1]}))
    words = ["import-masks", str(file), "table=market-1501", "name=m", f"root={tmp_path}"]
    assert main(words) == {"side_table": "m", "version": 1, "images": 2, "grid": [16, 8]}
    data = DataConfig(root=str(tmp_path))
    view = open_view(data, ("market-1501",), ("train",))
    opened = open_masks(data, ["m"], view, GRID, ("head", "upper", "legs"))
    where = [int(view.path(row)[6:10]) - 1 for row in range(2)]
    np.testing.assert_array_equal(opened.visible(np.arange(2)), masks[where])
    with pytest.raises(
        UserError, match="2 images are not in it"
    ):  # the query's and the gallery's, but nobody's are not asked
        main([*words, "splits=[train,query,gallery]"])
    with pytest.raises(UserError, match=r"splits=\['test'\]: name some of train"):
        main([*words, "splits=[test]"])
    marker = tmp_path / "ran"
    for content in evil_pickles(marker):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"masks\.pkl"):
            main([*words[:3], "name=evil", words[4]])
    file.write_bytes(evil_pickles(marker)[0])
    monkeypatch.setattr(sys, "argv", ["muva", *words[:3], "name=evil", words[4]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(muva.__file__).parent / "__main__.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "masks.pkl is no plain mask file and was not read: it holds the name" in caplog.text
    assert not marker.exists()
    assert not (tmp_path / "tables" / "evil.side.lance").exists()
