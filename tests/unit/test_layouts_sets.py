"""Parsers of the image, video and visible-infrared sets: smallest trees, nasty files, small sets' divisions."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from reid_dist.data import layouts
from reid_dist.data.check import check
from reid_dist.data.layouts._captions import CaptionSet
from reid_dist.data.layouts._small import splits_json
from reid_dist.data.layouts.base import open_tree
from reid_dist.data.layouts.cuhk_pedes import SET
from reid_dist.data.members import load_image
from reid_dist.data.records import DatasetError, ParsedDataset
from reid_dist.errors import UserError
from reid_dist.evaluation.protocols import Items, get, num_trials, select
from reid_dist.storage import open_store
from tests import fixtures_trees_image as image
from tests import fixtures_trees_moving as moving
from tests import fixtures_trees_small as small
from tests.fixtures_trees import ShuffledStore, TreeCase, jpeg, market_cases, text_cases
from tests.fixtures_trees_sets import SetCase
from tests.golden import cases, load

ALL: list[SetCase] = [
    *image.box_cases(), *image.msmt_cases(), *image.cuhk03_np_cases(), *image.classic_cases(), *image.cuhk02_cases(),
    *image.cuhk_sysu_cases(), small.split_case(), *small.small_nasty(), *small.csv_cases(), *moving.mars_cases(),
    *moving.ls_vid_cases(), *moving.ilids_vid_cases(), *moving.duke_video_cases(), *moving.sysu_cases(),
    *moving.regdb_cases(), *moving.llcm_cases(),
]  # fmt: skip
GOOD = [case for case in ALL if case.rows]
NASTY = [case for case in ALL if case.error]


def parse(case: SetCase, tmp_path, seed: int = 7, **options) -> ParsedDataset:
    store = ShuffledStore(case.write(tmp_path), seed=seed)
    return layouts.get(case.layout).parse(store, **{**case.options, **options})


def rows(parsed: ParsedDataset) -> tuple:
    return tuple((r.path, r.split, r.pid, r.camid, r.modality, r.tracklet, r.frame, r.trials) for r in parsed.records)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_good_tree(case: SetCase, seed: int, tmp_path) -> None:
    parsed = parse(case, tmp_path, seed)
    assert rows(parsed) == case.full_rows
    assert parsed.ignored == case.ignored
    assert {r.domain for r in parsed.records} == {case.layout}


@pytest.mark.parametrize("case", NASTY, ids=lambda case: case.name)
def test_nasty_tree(case: SetCase, tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        parse(case, tmp_path)
    assert all(word in str(caught.value) for word in case.error), str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_captions(tmp_path) -> None:
    whole = next(case for case in GOOD if case.name == "csv-full")
    parsed = parse(whole, tmp_path, domain="our-lab")
    assert [r.captions for r in parsed.records] == [("two, with a comma", "second"), ()]
    assert {r.domain for r in parsed.records} == {"our-lab"}


def test_val_and_cameras_of_raw_numbers_reach_their_protocols(tmp_path) -> None:
    """SYSU's and LLCM's rows carry the numbers that the protocols are written on."""
    for layout, protocol in (("sysu-mm01", "sysu-all-single-shot"), ("llcm", "llcm-visible-to-infrared")):
        case = next(case for case in GOOD if case.layout == layout)
        records = parse(case, tmp_path).records
        chosen = select(get(protocol), items(records))
        names = [[records[row].path for row in side] for side in (chosen.query, chosen.gallery)]
        if layout == "llcm":
            assert names == [["test_vis/cam1/0011/y.jpg", "test_vis/cam3/0011/x.jpg"], ["test_nir/cam1/0011/z.jpg"]]
        else:
            assert {name.split("/")[0] for name in names[0]} == {"cam3"}
            assert [name[:9] for name in names[1]] == ["cam1/0004", "cam2/0004", "cam1/0005"]


def items(records, trial: bool = False) -> Items:
    """Columns of a protocol; with `trial` every row once for each of its trials."""
    places = [(i, k) for i, r in enumerate(records) for k in range(len(r.trials) if trial else 1)]
    places = [(i, k) for i, k in places if not trial or records[i].trials[k]]
    return Items(
        split=np.array([records[i].trials[k] if trial else records[i].split for i, k in places]),
        pid=np.array([records[i].pid for i, _ in places]),
        camid=np.array([-1 if records[i].camid is None else records[i].camid for i, _ in places]),
        modality=np.array([records[i].modality for i, _ in places]),
        tracklet=np.array([-1 if records[i].tracklet is None else records[i].tracklet for i, _ in places]),
        path=np.array([records[i].path for i, _ in places]),
        trial=np.array([k for _, k in places]) if trial else None,
    )


# ---- divisions of the small sets

SMALL = {
    "prid2011": (small.prid_files(), 3, 3, 3 + 2),  # files, training ids, queries, gallery of each trial
    "viper": (small.viper_files(), 3, 3, 3),
    "i-lids": (small.ilids_files(), 3, 4, 4),
    "grid": (small.grid_files(), 3, 3, 3 + 2),
}


@pytest.mark.parametrize("layout", SMALL)
def test_ten_divisions(layout: str, tmp_path) -> None:
    files, trained, queries, gallery = SMALL[layout]
    parsed = parse(SetCase(layout, layout, files), tmp_path)
    table = items(parsed.records, trial=True)
    protocol = get("ten-splits")
    assert num_trials(protocol, table) == 10
    for k in range(10):
        side = {s: [r for r in parsed.records if r.trials[k] == s] for s in ("train", "query", "gallery", "")}
        people = {split: {r.pid for r in found} for split, found in side.items()}
        assert len(people["train"]) == trained
        assert len(side["query"]) == queries
        assert len(side["gallery"]) == gallery
        assert people["query"] <= people["gallery"]
        assert not people["train"] & (people["query"] | people["gallery"])
        assert not {r.path for r in side["query"]} & {r.path for r in side["gallery"]}
        chosen = select(protocol, table, k)
        assert (len(chosen.query), len(chosen.gallery)) == (queries, gallery)
    assert len({tuple(r.trials[k] for r in parsed.records) for k in range(10)}) > 3
    assert parsed.records == parse(SetCase(layout, layout, files), tmp_path, seed=99).records


def test_draws_are_the_published_rule(tmp_path) -> None:
    """reid-small4-v1: PCG64(20210 + k) permutes the sorted ids, the first half trains."""
    parsed = parse(SetCase("viper", "viper", small.viper_files()), tmp_path)
    for k in range(10):
        order = np.random.Generator(np.random.PCG64(20210 + k)).permutation(6)
        assert {r.pid for r in parsed.records if r.trials[k] == "train"} == set(order[:3].tolist())


def test_people_of_one_prid_camera(tmp_path) -> None:
    """Number 201 of cam_a is somebody else than 201 of cam_b, and takes no part."""
    parsed = parse(SetCase("prid2011", "prid2011", small.prid_files()), tmp_path)
    paths = {r.path for r in parsed.records}
    assert "single_shot/cam_a/person_0201.png" not in paths
    lone = [r for r in parsed.records if r.pid > 200]
    assert [(r.camid, set(r.trials)) for r in lone] == [(1, {"gallery"})] * 2
    smaller = parse(SetCase("prid2011", "prid2011", small.prid_files()), tmp_path, shared=201)
    assert "single_shot/cam_a/person_0201.png" in {r.path for r in smaller.records}


def test_own_split_file_reads_back(tmp_path) -> None:
    case = SetCase("i-lids", "i-lids", small.ilids_files("images"))
    drawn = parse(case, tmp_path)
    case = replace(case, files=case.files | {"ours.json": splits_json(drawn.records)})
    assert parse(case, tmp_path / "again", splits="ours.json").records == drawn.records
    assert drawn.notes["trials"] == "reid-small4-v1"


def test_grid_follows_the_authors_lists(tmp_path) -> None:
    parsed = parse(SetCase("grid", "grid", small.grid_files()), tmp_path)
    for k in range(10):
        trained = {r.pid for r in parsed.records if r.trials[k] == "train"}
        assert trained == {1 + k % 4, 2 + k % 4, 3 + k % 4}
    assert {t for r in parsed.records if r.pid == 0 for t in r.trials} == {"gallery"}


@cases("rle", "regdb_index")
def test_regdb_lists(case, tmp_path) -> None:
    """The authors' reader's paths and labels: our rows stand in the same trial, labels pair up people."""
    golden = load(case)
    files, expected = {}, {}
    for split in ("train", "test"):
        for side in ("visible", "thermal"):
            names = [golden[f"out_relpath_{side}"].tolist(), golden[f"out_label_{side}"].tolist()]
            half = [
                line for i, line in enumerate(golden[f"in_lines_{side}"].tolist()) if (i % 2 == 0) == (split == "train")
            ]
            files[f"idx/{split}_{side}_1.txt"] = "\n".join(half).encode()
            expected |= {p: split for i, p in enumerate(names[0]) if (i % 2 == 0) == (split == "train")}
    case_tree = SetCase("golden", "regdb", files | {path: jpeg() for path in expected})
    parsed = parse(case_tree, tmp_path)
    assert {r.path: r.split for r in parsed.records} == expected
    assert all(r.pid == int(r.path.split("/")[1]) for r in parsed.records)


# ---- members of files


def test_cells_and_boxes_become_images(tmp_path) -> None:
    classic = next(case for case in GOOD if case.name == "classic-good")
    store = open_store(str(classic.write(tmp_path)))
    parsed = layouts.get("cuhk03-classic").parse(store)
    for record in parsed.records:
        with Image.open(io.BytesIO(load_image(store, record.path))) as picture:
            assert (picture.format, picture.size) == ("PNG", (8, 16))
            pair, person, _, column = (int(part) for part in record.path.split("/")[1][:-4].split("_"))
            assert set(np.asarray(picture).ravel().tolist()) == {40 * pair + 20 * (person - 1) + column - 1}
    scenes = next(case for case in GOOD if case.name == "cuhk-sysu-good")
    store = open_store(str(scenes.write(tmp_path)))
    sizes = [
        Image.open(io.BytesIO(load_image(store, r.path))).size for r in layouts.get("cuhk-sysu").parse(store).records
    ]
    assert sizes == [(6, 16), (8, 16), (5, 10)]  # the last one cut at the scene's edge
    with pytest.raises(DatasetError, match="outside"):
        load_image(store, "Image/SSM/s1.jpg#xywh=30,1,5,5")
    with pytest.raises(FileNotFoundError):
        load_image(store, "cuhk-03.mat#detected/1_001_1_01.png")


# ---- check: everything that is wrong, file by file


def problems_of(layout: str, root, **options) -> tuple[str, ...]:
    return check(layouts.get(layout), open_store(str(root)), **options).problems


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_check_finds_nothing_wrong_with_a_good_tree(case: SetCase, tmp_path) -> None:
    found = check(layouts.get(case.layout), open_store(str(case.write(tmp_path))), **case.options)
    assert found.problems == ()
    assert rows(found.parsed) == case.full_rows
    assert found.warnings == parse(case, tmp_path / "again").warnings


@pytest.mark.parametrize("case", NASTY, ids=lambda case: case.name)
def test_check_finds_what_a_pack_would_refuse(case: SetCase, tmp_path) -> None:
    try:
        problems = problems_of(case.layout, case.write(tmp_path), **case.options)
    except UserError as error:  # the option is wrong, not the tree
        problems = (str(error),)
    assert any(all(word in problem for word in case.error) for problem in problems), problems


PICTURES = [case for case in (*GOOD, *market_cases(), *text_cases()) if case.rows and ".mat#" not in case.rows[0][0]]


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case.name)
def test_check_finds_half_a_picture_in_every_layout(case: SetCase | TreeCase, tmp_path) -> None:
    """All but CUHK03 classic, whose pictures are cells of one file."""
    path = case.rows[-1][0].partition("#")[0]
    half = jpeg(3, (64, 128))
    root = replace(case, files=case.files | {path: half[: len(half) // 2]}).write(tmp_path)
    problems = problems_of(case.layout, root, **getattr(case, "options", {}))
    assert problems
    assert all(path in problem and "cannot be decoded" in problem for problem in problems), problems


def test_check_names_every_file(tmp_path) -> None:
    market = market_cases()[0]
    wrong = {
        "query/0001_c7s1_001051_00.jpg": jpeg(), "query/notes.txt": b"x", "bounding_box_train/0002_c1s1_1.jpg": jpeg(),
        "bounding_box_test/0003_c1s6_011741_03.jpg": b"", "other/a.jpg": jpeg(),
        "query/0003_c4s6_015641_01.jpg": jpeg()[:150], "query/0000_c1s1_000001_00.jpg": jpeg(),
    }  # fmt: skip
    root = replace(market, files=market.files | wrong).write(tmp_path)
    problems = problems_of("market-1501", root)
    assert len(problems) == len(wrong)
    for path in wrong:
        assert sum(path in problem for problem in problems) == 1, (path, problems)
    lenient = check(layouts.get("market-1501"), open_store(str(root)), strict=False)
    assert [w for w in lenient.warnings if "other/a.jpg" in w]
    assert len(lenient.problems) == 3  # an empty file, half a picture, a distractor that asks


def test_check_goes_on_behind_a_missing_folder(tmp_path) -> None:
    """Somebody gave a folder too high, and one picture is broken: both are said, and no line for each of 25 files."""
    market = market_cases()[0]
    wrong = {f"extra/{i}.jpg": jpeg() for i in range(25)} | {"query/0003_c4s6_015641_01.jpg": b"no picture"}
    files = {p: d for p, d in (market.files | wrong).items() if not p.startswith("bounding_box_train/")}
    problems = problems_of("market-1501", replace(market, files=files).write(tmp_path))
    assert ["bounding_box_train/" in p for p in problems] == [True, False, False]
    assert "extra/ (with 25 files) does not belong to market-1501" in problems[1]
    assert "query/0003_c4s6_015641_01.jpg" in problems[2]
    msmt = next(case for case in GOOD if case.name == "msmt17-list-v1")
    files = {p: d for p, d in msmt.files.items() if p not in ("list_train.txt", "list_query.txt")}
    problems = problems_of("msmt17", replace(msmt, files=files).write(tmp_path / "m"))
    assert ["list_train.txt" in problems[0], "list_query.txt" in problems[1], len(problems)] == [True, True, 2]


def test_check_names_every_lost_frame_and_looks_at_pictures_without_lists(tmp_path) -> None:
    mars = next(case for case in GOOD if case.name == "mars-good")
    lost = [path for path in mars.files if path.startswith("bbox_train/")][:2]
    files = {p: d for p, d in mars.files.items() if p not in lost}
    problems = problems_of("mars", replace(mars, files=files).write(tmp_path))
    assert [sum(path in problem for problem in problems) for path in lost] == [1, 1]
    assert len(problems) == 2
    files = {p: d for p, d in mars.files.items() if p != "info/train_name.txt"} | {lost[0]: b"no picture"}
    problems = problems_of("mars", replace(mars, files=files).write(tmp_path / "lists"))
    assert ["train_name.txt" in p for p in problems] == [True, False]
    assert lost[0] in problems[1]
    lists = ("info/test_name.txt", "info/query_IDX.mat")
    without = replace(mars, files={p: d for p, d in mars.files.items() if p not in lists})
    (problem,) = problems_of("mars", without.write(tmp_path / "few"))
    assert "info/test_name.txt, info/query_IDX.mat not found" in problem


def test_check_of_annotations_and_lists(tmp_path) -> None:
    text = next(case for case in text_cases() if case.name == "rstpreid-good")
    entries = json.loads(text.files["data_captions.json"])
    entries[0]["split"], entries[2]["captions"] = "tset", [" "]
    files = text.files | {"data_captions.json": json.dumps(entries).encode()}
    problems = problems_of("rstpreid", replace(text, files=files).write(tmp_path))
    assert sum("entry 0" in p for p in problems) == sum("entry 2" in p for p in problems) == 1
    msmt = next(case for case in GOOD if case.name == "msmt17-list-v1")
    files = msmt.files | {"list_query.txt": b"x\ny 1\n"}
    problems = problems_of("msmt17", replace(msmt, files=files).write(tmp_path / "m"))
    assert [("line 1" in p, "line 2" in p) for p in problems[:2]] == [(True, False), (False, True)]
    empty = check(layouts.get("mars"), ShuffledStore(tmp_path / "nothing")).problems
    assert len(empty) == 1
    assert "no files" in empty[0]
    with pytest.raises(UserError, match="no option 'colour'"):
        problems_of("mars", tmp_path, colour=1)


# ---- sub-sentences of caption sets


def diversity(tmp_path, name: str, entries: list[dict]) -> dict:
    files = {"reid_raw.json": json.dumps(entries).encode(), "imgs/a.jpg": jpeg(), "imgs/b.jpg": jpeg(1)}
    return SET.diversity(open_tree(open_store(str(TreeCase(name, "cuhk-pedes", files).write(tmp_path / name)))))


def entry(image: str, split: str, count: int, **more) -> dict:
    return {"split": split, "id": 1, "file_path": image, "captions": ["text"] * count, **more}


def test_diversity_in_both_forms(tmp_path) -> None:
    entries = [
        entry("a.jpg", "train", 2, diversity_captions=["plain", [["one", "eins"], ["two"]]]),
        entry("b.jpg", "test", 1, val_diversity_captions=[[["x"]]]),
    ]
    assert diversity(tmp_path, "good", entries) == {
        "imgs/a.jpg": ((("plain",),), (("one", "eins"), ("two",))),
        "imgs/b.jpg": ((("x",),),),
    }
    assert diversity(tmp_path, "none", [entry("a.jpg", "train", 1)]) == {}
    for name, wrong in (("length", ["one"]), ("empty", ["", "b"]), ("flat", [["a"], "b"]), ("number", [1, "b"])):
        with pytest.raises(DatasetError, match="entry 0"):
            diversity(tmp_path, name, [entry("a.jpg", "train", 2, diversity_captions=wrong)])


def test_ufine_takes_any_ending_of_its_name(tmp_path) -> None:
    entries = [{"split": "train", "id": 1, "file_path": "images/1.jpg", "captions": ["a"]}]
    files = {"UFine6926_Annotations_v2.json": json.dumps(entries).encode(), "images/1.jpg": jpeg()}
    parsed = layouts.get("ufine6926").parse(ShuffledStore(TreeCase("u", "ufine6926", files).write(tmp_path)))
    assert [(r.path, r.pid, r.captions) for r in parsed.records] == [("images/1.jpg", 0, ("a",))]
    assert isinstance(SET, CaptionSet)
    both = files | {"UFine6926_Annotations.json": b"[]"}
    with pytest.raises(DatasetError, match="both"):
        layouts.get("ufine6926").parse(ShuffledStore(TreeCase("u", "ufine6926", both).write(tmp_path / "b")))


def test_every_layout_is_exercised() -> None:
    """A new layout comes with a good and a nasty tree."""
    trees = [*market_cases(), *text_cases(), *ALL]
    kinds = Counter((case.layout, bool(case.error)) for case in trees)
    for name in layouts.names():
        assert name in SMALL or kinds[name, False], name
        assert kinds[name, True], name
