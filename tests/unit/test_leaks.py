"""The leak guard: what it refuses, whom it names, what it lets pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import evaluate
from jobs.train import train
from reid_dist import methods
from reid_dist.config import DataConfig
from reid_dist.data import leaks
from reid_dist.data.leaks import LeakError, check_leaks
from reid_dist.data.records import Record
from reid_dist.data.store import TableView, open_view
from reid_dist.errors import UserError
from tests.tables import jpeg, write_table

Row = tuple[str, str, int, int | None, int]  # path, split, pid, camid, image number


def table(tmp_path: Path, name: str, rows: list[Row], trials: list[tuple[str, ...]] | None = None) -> None:
    records = [
        Record(path=path, split=split, pid=pid, camid=camid, domain=name, trials=trials[i] if trials else ())
        for i, (path, split, pid, camid, _) in enumerate(rows)
    ]
    write_table(str(tmp_path), name, records, [jpeg(number) for *_, number in rows], tmp_path / "raw" / name, chunk=99)


def view(tmp_path: Path, name: str, *splits: str, trial: int = 0) -> TableView:
    return open_view(DataConfig(root=str(tmp_path), trial=trial), name.split("+"), splits)


CLEAN: list[Row] = [
    ("train/1.jpg", "train", 1, 0, 1),
    ("train/2.jpg", "train", 2, 1, 2),
    ("train/junk.jpg", "train", -1, 2, 3),
    ("query/3.jpg", "query", 3, 0, 4),
    ("gallery/3.jpg", "gallery", 3, 1, 5),
    ("gallery/junk.jpg", "gallery", -1, 4, 6),
    ("val/1.jpg", "val", 1, 5, 7),
]


def test_a_clean_set_passes_and_its_shared_cameras_are_reported(tmp_path, caplog):
    table(tmp_path, "a", CLEAN)
    with caplog.at_level("INFO"):
        assert check_leaks(view(tmp_path, "a", "train"), view(tmp_path, "a")) == {"a": [0, 1]}
    assert "cameras [0, 1] of a" in caplog.text


def test_an_identity_on_both_sides_is_named_with_its_images(tmp_path):
    table(tmp_path, "a", [*CLEAN, ("gallery/late.jpg", "gallery", 2, 0, 8), ("gallery/more.jpg", "gallery", 2, 0, 9)])
    with pytest.raises(LeakError) as error:
        check_leaks(view(tmp_path, "a", "train"), view(tmp_path, "a"))
    text = str(error.value)
    assert "1 identities and 0 images" in text
    assert "identity 2 of a (train a/train/2.jpg, gallery a/gallery/late.jpg)" in text
    assert "\n" not in text
    assert isinstance(error.value, UserError)


def test_the_same_number_in_another_dataset_is_another_person(tmp_path):
    table(tmp_path, "a", CLEAN)
    table(tmp_path, "b", [("q.jpg", "query", 1, 0, 11), ("g.jpg", "gallery", 1, 0, 12), ("t.jpg", "train", 5, 0, 13)])
    assert check_leaks(view(tmp_path, "a", "train"), view(tmp_path, "b")) == {}


def test_the_same_image_in_another_dataset_is_found(tmp_path):
    table(tmp_path, "a", CLEAN)
    table(tmp_path, "b", [("q.jpg", "query", 70, 0, 11), ("g.jpg", "gallery", 70, 0, 2), ("t.jpg", "train", 8, 0, 1)])
    with pytest.raises(LeakError, match=r"0 identities and 1 images .*image train a/train/2.jpg, gallery b/g.jpg"):
        check_leaks(view(tmp_path, "a", "train"), view(tmp_path, "b"))


def test_many_offenders_are_counted_and_some_named(tmp_path):
    table(
        tmp_path,
        "a",
        [
            (f"{split}/{i}.jpg", split, i, 0, i + 50 * (split == "query"))
            for split in ("train", "query")
            for i in range(20)
        ],
    )
    with pytest.raises(LeakError, match="20 identities and 0 images") as error:
        check_leaks(view(tmp_path, "a", "train"), view(tmp_path, "a"))
    assert str(error.value).count("identity ") == 5


def test_each_division_is_held_against_its_own_test_side(tmp_path):
    rows: list[Row] = [(f"{i}.jpg", "", i // 2, i % 2, i) for i in range(8)]
    first = ["train", "train", "train", "train", "query", "gallery", "query", "gallery"]
    trials = [(split, first[(i + 4) % 8]) for i, split in enumerate(first)]
    rows = [(path, first[i], pid, cam, number) for i, (path, _, pid, cam, number) in enumerate(rows)]
    table(tmp_path, "ten", rows, trials)
    for trial in (0, 1):
        check_leaks(view(tmp_path, "ten", "train", trial=trial), view(tmp_path, "ten", trial=trial))
    with pytest.raises(LeakError, match="identity 0 of ten"):
        check_leaks(view(tmp_path, "ten", "train", trial=0), view(tmp_path, "ten", trial=1))
    table(tmp_path, "other", [("x.jpg", "train", 0, 0, 0)])  # an image that only the second division tests
    with pytest.raises(LeakError, match=r"image train other/x.jpg, \w+ ten/0.jpg"):
        check_leaks(view(tmp_path, "other", "train"), view(tmp_path, "ten"))
    assert len(leaks.tested(view(tmp_path, "ten"))) == 8
    assert len(leaks.tested(view(tmp_path, "other"))) == 0


def test_scoring_a_source_of_which_all_images_trained_is_refused(tmp_path):
    """The "all" protocols: b was to be tested, and somebody scores a, whose query and gallery were trained on."""
    table(tmp_path, "a", CLEAN)
    table(tmp_path, "b", [("q.jpg", "query", 70, 0, 11), ("g.jpg", "gallery", 70, 1, 12)])

    def scored(name: str, splits: tuple[str, ...], test: tuple[str, ...] = ("b",)) -> None:
        data = DataConfig(root=str(tmp_path), train=("a",), test=test, train_splits=splits)
        facts = {"recipe": {"data": {"train": ["a"], "test": list(test), "train_splits": list(splits)}}}
        run = SimpleNamespace(facts=facts)
        evaluate.refuse_new_leaks(SimpleNamespace(run=run, recipe=SimpleNamespace(data=data)), view(tmp_path, name))

    with pytest.raises(LeakError, match=r"1 identities and 2 images of a .*identity 3 of a"):
        scored("a", ("train", "query", "gallery"))
    scored("a", ("train",))
    scored("b", ("train", "query", "gallery"))
    scored("a", ("train",), test=())  # what training itself looked at


def test_a_training_job_refuses_before_it_starts(tmp_path):
    table(tmp_path, "a", [*CLEAN, ("gallery/late.jpg", "gallery", 2, 0, 8)])
    places = [f"data.root={tmp_path}", f"output={tmp_path}/runs", "data.train=[a]", "data.test=[a]"]
    with pytest.raises(LeakError, match="identity 2 of a"):
        train(methods.load_recipe("comoe/synthetic", places))
    assert not (tmp_path / "runs").exists()
