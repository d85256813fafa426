"""Parsers of the dataset layouts: smallest trees, nasty files, published annotation goldens."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from PIL import Image, ImageOps

from reid_dist.data import layouts
from reid_dist.data.decode import DecodeError, decode
from reid_dist.data.layouts.base import housekeeping
from reid_dist.data.records import DatasetError, ParsedDataset
from reid_dist.errors import UserError
from tests.fixtures_trees import (
    MARKET_INVALID_QUERIES,
    ShuffledStore,
    TreeCase,
    image_cases,
    jpeg,
    market_cases,
    text_cases,
)
from tests.golden import cases, load

ALL = [*market_cases(), *text_cases()]
GOOD = [case for case in ALL if case.rows]
NASTY = [case for case in ALL if case.error]


def rows(parsed: ParsedDataset) -> tuple:
    return tuple((r.path, r.split, r.pid, r.camid, r.captions) for r in parsed.records)


def named(trees: list[TreeCase]) -> dict:
    return {"argvalues": trees, "ids": [tree.name for tree in trees]}


@pytest.mark.parametrize("tree", **named(GOOD))
@pytest.mark.parametrize("shuffle", [1, 2])
def test_good_tree(tree: TreeCase, shuffle: int, tmp_path) -> None:
    parsed = layouts.get(tree.layout).parse(ShuffledStore(tree.write(tmp_path), seed=shuffle))
    assert rows(parsed) == tree.rows
    assert parsed.ignored == tree.ignored
    assert {key: parsed.notes[key] for key in tree.notes} == tree.notes
    assert all(r.domain == tree.layout and r.modality == "rgb" for r in parsed.records)
    assert any("published" in warning for warning in parsed.warnings), "a tiny tree differs from the published counts"


@pytest.mark.parametrize("tree", **named(NASTY))
def test_nasty_tree(tree: TreeCase, tmp_path) -> None:
    store = ShuffledStore(tree.write(tmp_path))
    with pytest.raises(DatasetError) as caught:
        layouts.get(tree.layout).parse(store)
    assert all(word in str(caught.value) for word in (*tree.error, store.uri)), str(caught.value)
    assert "\n" not in str(caught.value)
    if tree.lenient is not None:
        parsed = layouts.get(tree.layout).parse(store, strict=False)
        assert rows(parsed) == tree.lenient
        assert any(tree.error[0] in warning for warning in parsed.warnings)


def test_bytes_of_real_store(tmp_path) -> None:
    """The parser reads through the project's own store as through the fake one."""
    from reid_dist.storage import open_store

    for tree in GOOD:
        root = tree.write(tmp_path / tree.name)
        assert rows(layouts.get(tree.layout).parse(open_store(str(root)))) == tree.rows


def test_market_invalid_queries(tmp_path) -> None:
    """Two queries of the tree have nothing to find: a lone id, and an id that its own camera alone sees."""
    records = layouts.get("market-1501").parse(ShuffledStore(market_cases()[0].write(tmp_path))).records
    gallery = {(r.pid, r.camid) for r in records if r.split == "gallery"}
    queries = [r for r in records if r.split == "query"]
    lost = [q.pid for q in queries if not any(pid == q.pid and cam != q.camid for pid, cam in gallery)]
    assert tuple(lost) == MARKET_INVALID_QUERIES


def test_shared_ids_are_reported(tmp_path) -> None:
    case = market_cases()[0]
    case = replace(case, files={**case.files, "query/0007_c1s1_000001_00.jpg": jpeg()})
    parsed = layouts.get("market-1501").parse(ShuffledStore(case.write(tmp_path)))
    assert [w for w in parsed.warnings if "example 7" in w]


def test_unnamed_images_are_counted(tmp_path) -> None:
    case = next(case for case in text_cases() if case.name == "cuhk-pedes-good")
    case = replace(case, files={**case.files, "imgs/spare.jpg": jpeg()})
    parsed = layouts.get("cuhk-pedes").parse(ShuffledStore(case.write(tmp_path)))
    assert rows(parsed) == case.rows
    assert any("imgs/spare.jpg" in warning for warning in parsed.warnings)


def test_registry() -> None:
    assert {"cuhk-pedes", "icfg-pedes", "rstpreid", "market-1501"} <= set(layouts.names())
    with pytest.raises(UserError, match="'market-1501'"):
        layouts.get("market1501")
    with pytest.raises(UserError, match="known: "):
        layouts.get("xyzzy")


@pytest.mark.parametrize("name", layouts.names())
def test_every_layout_says_what_it_wants(name: str, tmp_path) -> None:
    layout = layouts.get(name)
    assert layout.tree.strip()
    assert layout.obtain.strip()
    assert layout.task in ("text", "image", "video", "visible-infrared", "any")
    assert all(counts for counts in layout.expected.values())
    with pytest.raises(DatasetError, match="no files"):
        layout.parse(ShuffledStore(tmp_path))
    with pytest.raises(UserError, match="no option 'colour'"):
        layout.parse(ShuffledStore(tmp_path), colour="red")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Thumbs.db", True), ("a/THUMBS.DB", True), (".git/config", True), ("a/._b.jpg", True), ("desktop.ini", True),
        ("__MACOSX/a.jpg", True), ("a/Thumbs.db.jpg", False), ("a.jpg", False), ("a__MACOSX/b.jpg", False),
    ],
)  # fmt: skip
def test_housekeeping(path: str, expected: bool) -> None:
    assert housekeeping(path) is expected


@pytest.mark.parametrize("image", image_cases(), ids=lambda case: case.name)
def test_corruption_fixtures_are_what_they_claim(image) -> None:
    """The library sees them as stated, so the next test means something."""

    def opened() -> Image.Image:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(image.data))).convert("RGB")

    if image.size is None:
        with pytest.raises(OSError):
            opened()
    else:
        assert opened().size == image.size


@pytest.mark.parametrize("image", image_cases(), ids=lambda case: case.name)
def test_odd_image_files_become_upright_rgb_or_are_refused_by_name(image) -> None:
    if image.size is None:
        with pytest.raises(DecodeError, match=f"^a/{image.name}: .*again"):
            decode(image.data, f"a/{image.name}")
        return
    pixels = decode(image.data, f"a/{image.name}")
    assert (pixels.shape, pixels.dtype) == ((image.size[1], image.size[0], 3), "uint8")


# Goldens: the published readers' rows from our parser. Theirs leave the ids of other splits unshifted; ours shift all
# splits alike, so theirs are pid + first_id there. Their paths start at the parent of the dataset's folder.
_SETS = {"CUHK-PEDES": ("cuhk-pedes", 1), "ICFG-PEDES": ("icfg-pedes", 0), "RSTPReid": ("rstpreid", 0)}


def parse_golden(tmp_path, layout: str, file: str, entries: list[dict]) -> ParsedDataset:
    files = {file: json.dumps(entries).encode()}
    files |= {f"imgs/{e.get('file_path') or e['img_path']}": jpeg() for e in entries}
    tree = TreeCase("golden", layout, files)
    return layouts.get(layout).parse(ShuffledStore(tree.write(tmp_path)))


@cases("comoe", "annotation")
def test_comoe_annotations(case, tmp_path) -> None:
    golden = load(case)
    layout, first_id = _SETS[golden["const_dataset"]]
    parsed = parse_golden(tmp_path, layout, golden["const_file"], json.loads(golden["in_annotations_json"]))

    def split(name: str) -> list:
        return [r for r in parsed.records if r.split == name]

    def path(record) -> str:
        return f"{golden['const_dataset']}/{record.path}"

    train = [[r.pid, n, path(r), text] for n, r in enumerate(split("train")) for text in r.captions]
    assert train == json.loads(golden["out_train_json"])
    assert parsed.counts()["train"]["ids"] == golden["out_num_classes"]
    for name in ("test", "val"):
        assert json.loads(golden[f"out_{name}_json"]) == {
            "image_pid": [r.pid + first_id for r in split(name)],
            "image_path": [path(r) for r in split(name)],
            "caption_pid": [r.pid + first_id for r in split(name) for _ in r.captions],
            "caption": [text for r in split(name) for text in r.captions],
        }


@cases("icl", "annotations__cuhk_pedes", "annotations__icfg_pedes", "annotations__rstpreid")
def test_icl_annotations(case, tmp_path) -> None:
    golden = load(case)
    layout = case.stem.partition("__")[2].replace("_", "-")
    first_id = 1 if layout == "cuhk-pedes" else 0
    file = {"cuhk-pedes": "reid_raw.json", "icfg-pedes": "ICFG-PEDES.json", "rstpreid": "data_captions.json"}[layout]
    entries = json.loads(golden["in_train_json"]) + json.loads(golden["in_test_json"])
    parsed = parse_golden(tmp_path, layout, file, entries)
    train = [(n, r, text) for n, r in enumerate(r for r in parsed.records if r.split == "train") for text in r.captions]
    test = [r for r in parsed.records if r.split == "test"]
    assert [r.pid for _, r, _ in train] == golden["out_train_pids"].tolist()
    assert [n for n, _, _ in train] == golden["out_train_image_ids"].tolist()
    assert [f"ROOT/{r.path}" for _, r, _ in train] == json.loads(golden["out_train_paths"])
    assert [text for _, _, text in train] == json.loads(golden["out_train_captions"])
    assert [r.pid + first_id for r in test] == golden["out_test_image_pids"].tolist()
    assert [r.pid + first_id for r in test for _ in r.captions] == golden["out_test_caption_pids"].tolist()
    assert [text for r in test for text in r.captions] == json.loads(golden["out_test_captions"])
    assert "diversity_captions" in parsed.notes["unread keys"]
