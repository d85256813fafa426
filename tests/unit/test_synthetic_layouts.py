"""Writer -> strict parser -> records is the identity, for every layout; part masks come beside the images."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from reid_dist.config import DataConfig
from reid_dist.data import layouts, pack, tables
from reid_dist.data.layouts import msmt17
from reid_dist.data.layouts.cuhk_pedes import SET
from reid_dist.data.members import load_image
from reid_dist.data.records import Record, first_split
from reid_dist.data.store import NONE, TableView, open_view
from reid_dist.data.synthetic import plan_synthetic, world_for, write_synthetic
from reid_dist.data.synthetic.parts import part_mask
from reid_dist.data.synthetic.words import read_phrases
from reid_dist.data.synthetic.write import FORMS
from reid_dist.data.tracklets import read_tracklets, tracklets_of, write_tracklets
from reid_dist.errors import UserError
from reid_dist.storage import open_store
from tests.fixtures_trees import TRAP, ShuffledStore

DRAWN_BY_PARSER = ("prid2011", "viper", "i-lids")  # their divisions are a rule of ours, not part of the tree
NO_CAMERAS = ("cuhk-pedes", "icfg-pedes", "rstpreid", "ufine6926")  # their files name none


def small(layout: str) -> dict:
    """Few people for a layout, and each kind that it has."""
    preset = FORMS[layout][1]
    sizes = {"num_train": 6, "num_val": 3, "num_distractors": 6}
    asked = {name: size for name, size in sizes.items() if preset.get(name, 1000 if name == "num_train" else 0)}
    if "num_val" not in preset:
        asked["num_val"] = 3
    if preset.get("images_per_id", 0) == 12:
        asked["images_per_id"] = 4
    if "max_frames" in preset:
        asked["max_frames"] = 5
    return {"num_test": 8, "size": (32, 16), "seed": 5, **asked}


def pixels(image: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"), np.float32)


def test_every_layout_has_a_synthetic_form() -> None:
    assert set(FORMS) == set(layouts.names())


@pytest.mark.parametrize("layout", layouts.names())
def test_round_trip(layout: str, tmp_path) -> None:
    root, form, world = tmp_path / TRAP / "set", layouts.get(layout), world_for(layout, **small(layout))
    plan = plan_synthetic(world, layout)
    samples = list(world.samples(plan))
    paths = form.write(root, samples)
    store, parsed = open_store(str(root)), form.parse(ShuffledStore(root))
    by_path = {record.path: record for record in parsed.records}
    kept = [row for row in zip(paths, plan, samples, strict=True) if row[1].pid >= 0]  # junk is dropped
    assert len(by_path) == len(parsed.records) == len(kept)
    assert parsed.ignored == ()
    for path, shot, sample in kept:
        record = by_path[path]
        trials = record.trials if layout in DRAWN_BY_PARSER else shot.trials
        wanted = Record(
            path=path, pid=shot.pid, split=first_split(trials) if trials else shot.split,
            camid=None if layout in NO_CAMERAS else shot.camid, modality=shot.modality, tracklet=shot.tracklet,
            frame=record.frame if form.task not in ("video", "any") else shot.frame, domain=layout,
            captions=sample.captions, trials=trials,
        )  # fmt: skip
        if layout == "sysu-mm01" and shot.split == "val":
            wanted = Record(**{**_fields(wanted), "split": "train"})
        assert record == wanted
        difference = np.abs(pixels(load_image(store, path)) - pixels(sample.image)).mean()
        assert difference < (3 if layout == "cuhk-sysu" else 1e-9), f"{path}: {difference}"  # scenes are JPEG once more


def _fields(record: Record) -> dict:
    return {name: getattr(record, name) for name in Record.__slots__}


def test_text_files_keep_the_order_of_the_plan(tmp_path) -> None:
    world = write_synthetic(tmp_path / "set", "ufine6926", **small("ufine6926"))
    parsed = layouts.get("ufine6926").parse(open_store(str(tmp_path / "set")))
    assert [(r.split, r.pid) for r in parsed.records] == [(s.split, s.pid) for s in plan_synthetic(world, "ufine6926")]


def test_market_notes(tmp_path) -> None:
    write_synthetic(tmp_path / "set", "market-1501", **small("market-1501"))
    notes = layouts.get("market-1501").parse(open_store(str(tmp_path / "set"))).notes
    assert notes["junk"].startswith("3 ")
    assert notes["distractors"].startswith("6 ")


def test_flat_msmt_reads_as_the_listed_one(tmp_path) -> None:
    world = world_for("msmt17", **small("msmt17"))
    samples = list(world.samples(plan_synthetic(world, "msmt17")))
    names = msmt17.write(tmp_path / "a", samples), msmt17.write_flat(tmp_path / "b", samples)
    sides = [
        {
            r.path: (r.split, r.pid, r.camid)
            for r in layouts.get("msmt17").parse(open_store(str(tmp_path / side))).records
        }
        for side in "ab"
    ]
    assert [sides[0][name] for name in names[0]] == [sides[1][name] for name in names[1]]
    assert all(camid == s.camid and pid == s.pid for s, (_, pid, camid) in
               zip(samples, (sides[0][n] for n in names[0]), strict=True))  # fmt: skip


def test_part_masks_stand_beside_the_images(tmp_path) -> None:
    world = write_synthetic(tmp_path / "set", "market-1501", parts=tmp_path / "parts.npz", **small("market-1501"))
    paths = {r.path for r in layouts.get("market-1501").parse(open_store(str(tmp_path / "set"))).records}
    with np.load(tmp_path / "parts.npz") as masks:
        assert paths <= set(masks.files)
        assert all(masks[path].shape == (3, 128) and masks[path].dtype == bool for path in masks.files)
        shot = plan_synthetic(world, "market-1501")[0]
        name = next(
            n for n in masks.files if n.startswith("bounding_box_train/0001") and f"c{shot.camid + 1}s1_000000" in n
        )
        assert (masks[name] == part_mask(world.sample(shot)[1])).all()


def test_paraphrases_are_written_and_read(tmp_path) -> None:
    write_synthetic(tmp_path / "set", diversity=True, num_train=3, num_val=0, num_test=3)
    entries = json.loads((tmp_path / "set" / "reid_raw.json").read_text("utf-8"))
    groups = SET.diversity(layouts.base.open_tree(open_store(str(tmp_path / "set"))))
    assert len(groups) == len(entries) == 18
    for entry in entries:
        for caption, of_caption in zip(entry["captions"], groups[f"imgs/{entry['file_path']}"], strict=True):
            said = [[read_phrases(text) for text in group] for group in of_caption]
            assert all(one == group[0] for group in said for one in group), "paraphrases state the same"
            assert {k: v for group in said for k, v in group[0].items()} == read_phrases(caption)
    assert all(("diversity_captions" in e) == (e["split"] == "train") for e in entries)


# ---- writer -> parser -> table -> records


def packed(layout: str, tmp_path) -> pack.Plan:
    """A small synthetic tree of a layout, packed by the job's own functions."""
    write_synthetic(tmp_path / TRAP / "set", layout, **small(layout))
    todo = pack.plan(layout, str(tmp_path / TRAP / "set"), str(tmp_path))
    results = []
    for number in range(2):  # two data files
        half = len(todo.parsed.records) // 2
        part = todo.parsed.records[half:] if number else todo.parsed.records[:half]
        results.append({"chunk": number, **pack._write_chunk(number, part, todo.source, todo.uri, todo.tag, "stop")})
    facts = pack._facts(todo, results)
    tables.commit(todo.uri, todo.tag, results, facts)
    write_tracklets(todo.root, todo.name, facts.content)
    return todo


def record_of(view: TableView, row: int) -> Record:
    """A row as the record that it was made from."""

    def known(value: int) -> int | None:
        return None if value == NONE else int(value)

    return Record(
        path=view.path(row), split=str(view.split[row]), pid=int(view.pid[row]), camid=known(view.camid[row]),
        modality=str(view.modality[row]), tracklet=known(view.tracklet[row]), frame=known(view.frame[row]),
        domain=str(view.domain_name[row]), captions=view.captions[row], trials=view.trials[row],
    )  # fmt: skip


@pytest.mark.parametrize("layout", layouts.names())
def test_a_table_gives_back_the_records(layout: str, tmp_path) -> None:
    """With `test_round_trip`: writer -> parser -> table -> records is the identity, for every layout."""
    todo = packed(layout, tmp_path)
    records = todo.parsed.records
    view = open_view(DataConfig(root=str(tmp_path)), (layout,))
    assert tuple(record_of(view, row) for row in range(len(view))) == records
    store = open_store(todo.source)
    assert view.encoded(np.arange(len(view))) == [load_image(store, record.path) for record in records]
    assert json.loads(view.tables[0].facts.notes["synthetic"])["layout"] == layout
    check_trials(view, records)
    check_tracklets(view, records, str(tmp_path), layout)
    assert pack.plan(layout, todo.source, str(tmp_path)).present is not None  # nothing is left to do


def check_trials(view: TableView, records: tuple[Record, ...]) -> None:
    """One row per image whatever the number of trials; a view shows one trial's splits, or every row in each trial."""
    count = len(records[0].trials) or 1
    assert view.num_trials == count
    for number in range(count):
        splits = [(r.trials[number] or "unused") if r.trials else r.split for r in records]
        assert view.trial(number).split.tolist() == splits
        half = view.trial(number).select(np.arange(0, len(view), 2))
        assert half.split.tolist() == splits[::2]
    rows, trials, splits = view.trial_rows()
    assert sorted(zip(rows.tolist(), trials.tolist(), splits.tolist(), strict=True)) == [
        (row, k, split) for row, r in enumerate(records) for k, split in enumerate(r.trials or (r.split,)) if split
    ]
    with pytest.raises(UserError, match=f"no trial {count}"):
        view.trial(count)


def check_tracklets(view: TableView, records: tuple[Record, ...], root: str, name: str) -> None:
    """One row per tracklet, its frames in order; none for sets of images."""
    content = view.tables[0].facts.content
    frames: dict[int, list[int]] = {}
    for row, record in enumerate(records):
        if record.tracklet is not None:
            frames.setdefault(record.tracklet, []).append(row)
    if not frames:
        with pytest.raises(UserError, match="no tracklet table"):
            read_tracklets(root, name, content)
        return
    ordered = {number: sorted(rows, key=lambda row: records[row].frame or 0) for number, rows in frames.items()}
    found = read_tracklets(root, name, content)
    assert [row["tracklet"] for row in found] == list(ordered)
    for row in found:
        first = records[ordered[row["tracklet"]][0]]
        assert row["rows"] == ordered[row["tracklet"]]
        assert row["length"] == len(row["rows"])
        assert (row["pid"], row["camid"], row["split"], row["domain"]) == (first.pid, first.camid, first.split, name)
        assert tuple(row["trials"]) == first.trials
        assert tracklets_of(view, np.array(row["rows"][-1:]))[0].tolist() == row["rows"]
    with pytest.raises(UserError, match="or an older one"):
        read_tracklets(root, name, "other")


def test_frames_of_a_view_in_any_order_are_one_tracklet_in_frame_order(tmp_path) -> None:
    packed("mars", tmp_path)
    view = open_view(DataConfig(root=str(tmp_path)), ("mars",))
    mixed = view.select(np.random.default_rng(0).permutation(len(view)))
    for row in range(0, len(mixed), 7):
        same = (mixed.tracklet == mixed.tracklet[row]) & (mixed.pid == mixed.pid[row])
        members = tracklets_of(mixed, np.array([row]))[0]
        assert sorted(members.tolist()) == np.flatnonzero(same).tolist()
        assert mixed.frame[members].tolist() == sorted(mixed.frame[same].tolist())


def test_two_datasets_of_the_generic_form_are_two(tmp_path) -> None:
    """Id 1 of one lab's table is not id 1 of another's."""
    write_synthetic(tmp_path / "set", "csv", **small("csv"))
    names = [
        {r.domain for r in pack.plan("csv", str(tmp_path / "set"), str(tmp_path), **words).parsed.records}
        for words in ({"name": "ours"}, {"name": "theirs"}, {"name": "ours", "domain": "theirs"})
    ]
    assert names == [{"ours"}, {"theirs"}, {"theirs"}]


def test_a_lost_tracklet_table_is_made_again(tmp_path) -> None:
    todo = packed("mars", tmp_path)
    open_store(todo.root).delete_tree("tables/mars.tracklets.lance")
    assert pack.plan("mars", todo.source, str(tmp_path)).present is None
