"""Searching a feature file: what is found, whom a query may name, the page with its pictures."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from jobs import _search, evaluate
from reid_dist.data.records import Record
from reid_dist.errors import UserError
from tests.colour import flat, loaded
from tests.tables import write_table

COLOURS = [(250, 0, 0), (240, 20, 0), (230, 60, 0), (0, 250, 0), (0, 240, 30), (0, 0, 250)]


@pytest.fixture
def place(tmp_path):
    """A feature file of six pictures (0 is a query), and the pictures."""
    paths = [f"im/{i} <b>.png" for i in range(6)]
    (tmp_path / "im").mkdir()
    for path, colour in zip(paths, COLOURS, strict=True):
        (tmp_path / path).write_bytes(flat(*colour))
    np.savez(
        tmp_path / "x.npz",
        feat=np.array(COLOURS, np.float32),
        pid=np.array([1, 1, 2, 3, 3, -1]),
        split=np.array(["query", *["gallery"] * 5]),
        path=np.array(paths),
    )
    return tmp_path


def search(place, *words):
    return evaluate.main(["--search", str(place / "x.npz"), *words])


def test_the_nearest_come_first_and_a_query_does_not_find_itself(place):
    record = search(place, "--query", "im/0 <b>.png", "--query", "row:4", "top=2")
    first, second = record["results"]
    assert [item["row"] for item in first["top"]] == [1, 2]
    assert [item["correct"] for item in first["top"]] == [True, False]
    assert first["top"][0]["score"] == pytest.approx(np.cos(np.arctan(20 / 240)), abs=1e-5)
    found = [item["row"] for item in second["top"]]
    assert found[0] == 3
    assert 4 not in found
    assert "page" not in record


def test_another_file_of_queries(place):
    np.savez(place / "q.npz", feat=np.array([[0, 0, 9], [9, 0, 0]], np.float32))
    results = search(place, "--query", str(place / "q.npz"), "top=1")["results"]
    assert [result["top"][0]["row"] for result in results] == [5, 1]
    assert "correct" not in results[0]["top"][0]


def pictures_of(page: str) -> list[tuple[int, int, int]]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((1, 1)) for data in found]


def near(a, b) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 12


def test_the_page_shows_the_pictures_in_order(place):
    record = search(place, "--query", "row:0", f"images={place}", f"out={place}/page.html", "top=5")
    page = (place / "page.html").read_text()
    assert record["page"] == f"{place}/page.html"
    shown = pictures_of(page)
    order = [0, *(item["row"] for item in record["results"][0]["top"])]
    assert len(shown) == 6
    assert all(near(a, COLOURS[row]) for a, row in zip(shown, order, strict=True))
    assert "0 <b>" not in page  # escaped
    assert page.count("&#10003;") == 1
    assert 'class="unknown"' in page  # nobody knows who row 5 is
    assert "Metrics against chance" not in page


def test_pictures_from_a_table(place):
    records = [Record(path=f"im/{i} <b>.png", split="gallery", pid=i, camid=0) for i in range(6)]
    write_table(str(place), "t", records, [flat(*colour) for colour in COLOURS], place / "raw")
    search(place, "--query", "row:5", "table=t", f"root={place}", f"out={place}/page.html", "top=1")
    assert near(pictures_of((place / "page.html").read_text())[0], COLOURS[5])


def test_a_run_encodes_an_image_that_is_not_in_the_file(place, monkeypatch):
    monkeypatch.setattr("reid_dist.training.loaded.load_run", lambda uri, which: loaded(str(place), []))
    (place / "new.png").write_bytes(flat(0, 0, 200))
    word = ["--query", str(place / "new.png"), "run=somewhere"]
    record = search(place, *word, f"images={place}", f"out={place}/page.html", "top=1")
    assert record["results"][0]["top"][0]["row"] == 5
    assert near(pictures_of((place / "page.html").read_text())[0], (0, 0, 200))
    with pytest.raises(UserError, match="cannot encode a sentence"):
        search(place, "--query", "a woman in blue", "run=somewhere")


def test_a_run_encodes_a_sentence(place, monkeypatch):
    model = loaded(str(place), [], task="text")
    seen = []

    def encode_side(given, view, side):
        seen.append((side.kind, view.captions[int(side.rows[0])][int(side.part[0])]))
        return {"colour": np.array([[0, 9, 0]], np.float32)}

    monkeypatch.setattr("reid_dist.training.loaded.load_run", lambda uri, which: model)
    monkeypatch.setattr("reid_dist.training.encode.encode_side", encode_side)
    record = search(place, "--query", "a man in green", "run=somewhere", "top=1")
    assert seen == [("text", "a man in green")]
    assert record["results"][0]["top"][0]["row"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--query", "nowhere.jpg"], "is no path in the searched file, no row:N and no feature file.*say run=RUN"),
        (["--query", "nowhere.jpg", "run=r"], "nowhere.jpg: no such file"),
        (["--query", "row:6"], "the file has rows 0 to 5"),
        (["--query", "row:0", "top=0"], "top=0"),
        (["--query", "row:0", "images=a", "table=b"], "give one"),
        (["--query", "row:0", "topp=3"], "did you mean 'top'"),
    ],
)
def test_queries_that_name_nothing_are_refused(words, message, place):
    with pytest.raises(UserError, match=message):
        search(place, *words)


def test_files_that_cannot_be_searched_are_refused(place):
    np.savez(place / "x.npz", feat=np.ones((2, 3), np.float32), pid=np.ones(2, int))
    with pytest.raises(UserError, match=r"a search needs the columns \['feat', 'path'\]; missing \['path'\]"):
        search(place, "--query", "row:0")
    np.savez(
        place / "x.npz", feat=np.ones((2, 3), np.float32), path=np.array(["a", "b"]), split=np.array(["train"] * 2)
    )
    with pytest.raises(UserError, match=r"no row of split gallery or test to search, only \['train'\]"):
        search(place, "--query", "row:0")
    np.savez(place / "x.npz", feat=np.ones((2, 3), np.float32), path=np.array(["a", "b"]))
    np.savez(place / "q.npz", feat=np.ones((1, 4), np.float32))
    with pytest.raises(UserError, match="4 dimensions, gallery features 3"):
        search(place, "--query", str(place / "q.npz"))
    with pytest.raises(UserError, match="holds no picture"):
        search(place, "--query", "row:0", f"images={place}")
    assert _search.gallery_rows("x", {"feat": np.ones((2, 3))}).tolist() == [0, 1]
