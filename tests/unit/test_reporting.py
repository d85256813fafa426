"""The report page: nothing from data becomes markup, nothing is fetched, numbers on it are the numbers given."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from reid_dist.reporting import (
    Curves,
    RankedItem,
    RankList,
    ReportInput,
    Section,
    expert_usage,
    line_chart,
    metrics_table,
    render_report,
    spread_queries,
    table,
)
from reid_dist.reporting.figures import _ticks, data_uri
from reid_dist.reporting.page import SYNTHETIC

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"
RECORD = {
    "rank1": 0.4567, "rank5": 0.6, "rank10": 0.7, "mAP": 0.43, "mINP": 0.2, "chance_mAP": 0.043, "chance_rank1": 0.017,
    "num_queries": 1360, "num_invalid": 2, "tie_rate": 0.0123,
}  # fmt: skip


class Tags(HTMLParser):
    """Tags with their attributes, and the text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def picture(height: int = 64, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (height // 2, height), (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


def run(**more) -> ReportInput:
    plain = {
        "title": "A run", "summary": "What it is.", "metrics": {"trained": RECORD}, "synthetic": True,
        "command": "python -m jobs.train x", "recipe": "seed: 1", "provenance": {"Seeds": "1"},
    }  # fmt: skip
    return ReportInput(**{**plain, **more})


def test_data_never_becomes_markup():
    items = [RankedItem(correct=True, image=picture(), label=EVIL, score=0.5), RankedItem(correct=False, text=EVIL)]
    page = render_report(
        run(
            title=EVIL, summary=EVIL, metrics={EVIL: RECORD}, command=EVIL, recipe=EVIL, provenance={EVIL: EVIL},
            curves=[Curves(EVIL, {EVIL: ([1, 2], [3, 4])}, x_label=EVIL, note=EVIL)], metrics_note=EVIL,
            rank_lists=[RankList(items=items, caption=EVIL, label=EVIL)],
            sections=[
                Section(EVIL, [EVIL, expert_usage({EVIL: {EVIL: [1, 2]}}), table([EVIL, EVIL], [[EVIL, EVIL]])], EVIL),
            ],
        )
    )  # fmt: skip
    tags = Tags(page)
    assert not [t for t, _ in tags.tags if t in ("script", "iframe", "link", "object", "embed", "form")]
    assert not [a for _, a in tags.tags if any(name.startswith("on") for name in a)]
    assert tags.text.count(EVIL) >= 14
    assert tags.open == []


def test_page_fetches_nothing():
    page = render_report(run(rank_lists=[RankList(items=[RankedItem(correct=True, image=picture())], image=picture())]))
    sources = [
        value for _, a in Tags(page).tags for name, value in a.items() if name in ("src", "href", "srcset", "data")
    ]
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?://", page)


def test_numbers_on_the_page_are_those_of_the_record():
    text = Tags(render_report(run(metrics={"trained": RECORD, "untrained": {"rank1": 0.02, "mAP": 0.05}}))).text
    for shown in ("45.7", "43.0", "4.3", "10.0 x", "1.7", "1,360 queries", "2 of them without", "1.23 %", "untrained"):
        assert shown in text, shown
    row = str(metrics_table({"untrained": {"rank1": 0.02}}))
    assert row.count("&ndash;") == 7  # what was not measured is a dash, not a zero


@pytest.mark.parametrize("synthetic", [True, False])
def test_synthetic_scores_are_said_to_be_no_evidence(synthetic):
    assert (SYNTHETIC in Tags(render_report(run(synthetic=synthetic))).text) is synthetic
    assert "no evidence about published accuracy" in SYNTHETIC


def test_right_and_wrong_differ_by_sign_and_words_not_only_by_colour():
    items = [RankedItem(correct=False, image=picture()), RankedItem(correct=True, image=picture())]
    page = render_report(run(rank_lists=[RankList(items=items, caption="A man.", ap=0.5, matches=1)]))
    tags = Tags(page)
    assert [a["alt"] for t, a in tags.tags if t == "img"] == ["wrong person at rank 1", "right person at rank 2"]
    assert "\u2717 1" in tags.text
    assert "\u2713 2" in tags.text
    assert "AP 50.0 %, 1 true\n match in the gallery" in tags.text


def test_curves_keep_ends_gaps_and_means():
    chart = str(line_chart(Curves("loss", {"a": (range(5), [5.0, 4.0, float("nan"), 2.0, 1.0])})))
    assert re.search(r"d='M[\d. ]+L[\d. ]+M[\d. ]+L[\d. ]+'", chart)  # the gap lifts the pen
    assert "<b>1</b>" in chart
    long = str(line_chart(Curves("loss", {"a": (range(3000), np.linspace(0, 1, 3000))})))
    assert "mean of up to 10 records" in long
    points = re.search(r"stroke-dasharray=\"none\" d='([^']+)'", long)[1]
    assert points.count("L") == 299
    assert "nothing was recorded" in line_chart(Curves("loss", {"a": ([], []), "b": ([1], [float("nan")])}))
    dot = str(line_chart(Curves("loss", {"b": ([1, 3], [2.0, 1.0]), "a": ([3], [2.0])}))).split("<ul")[0]
    assert re.search(r'<path class="line dot c1" d=.M[\d. ]+h0.1', dot)  # no dashes, which would hide it
    percent = line_chart(Curves("mAP", {"a": ([0, 1], [0.1, 0.25])}, percent=True))
    assert "<b>25 %</b>" in percent
    with pytest.raises(ValueError, match="3 x and 2 y"):
        line_chart(Curves("loss", {"a": ([1, 2, 3], [1, 2])}))


def test_chart_places_points_by_value():
    chart = str(line_chart(Curves("x", {"a": ([0, 10], [0.0, 4.0])})))
    path = re.search(r"d='M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)'", chart)
    left, bottom, right, top = map(float, path.groups())
    labels = {float(y) - 4: text for y, text in re.findall(r"class=y x='52' y='([\d.]+)'>([\d.]+)<", chart)}
    assert labels[bottom] == "0"
    assert labels[top] == "4"
    assert (left, right) == (58.0, 548.0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 3), (-0.2, 7.3), (1e-7, 5e-4), (0, 0), (990, 123456)])
def test_ticks_enclose_the_data(low, high):
    ticks = _ticks(low, high, 5)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_expert_usage_shows_entropy_against_its_greatest_value():
    text = str(expert_usage({"block 1": {"image": [30, 10, 0], "text": [1, 1, 1]}}))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert f"entropy {entropy:.3f} of log 3 = 1.099" in text
    assert "entropy 1.099 of log 3" in text
    heights = [float(h) for h in re.findall(r"height='([\d.]+)'", text)]
    assert heights[1] / heights[0] == pytest.approx(1 / 3, abs=0.01)
    with pytest.raises(ValueError, match="no token was routed"):
        expert_usage({"b": {"image": [0, 0]}})
    with pytest.raises(ValueError, match="different numbers"):
        expert_usage({"b": {"image": [1, 2], "text": [1]}})


def test_queries_are_spread_from_best_to_worst():
    ap = np.random.default_rng(0).random(101)
    ap[7] = np.nan
    picked = spread_queries(ap, 5)
    ranks = np.argsort(np.argsort(-ap[np.isfinite(ap)]))
    assert ranks[np.searchsorted(np.flatnonzero(np.isfinite(ap)), picked)].tolist() == [0, 25, 50, 74, 99]
    assert spread_queries(np.array([0.1, 0.9]), 10).tolist() == [1, 0]
    assert spread_queries(np.array([np.nan]), 3).tolist() == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_become_small_jpegs(kind):
    import base64

    data = base64.b64decode(data_uri(picture(800, kind)).partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (96, 192))
        assert image.getpixel((48, 96))[0] > 150


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="cannot be read"):
        render_report(run(rank_lists=[RankList(items=[RankedItem(correct=True, image=b"no picture")])]))
    with pytest.raises(ValueError, match="at least one record"):
        render_report(run(metrics={}))
    with pytest.raises(ValueError, match="2 cells, the header 1"):
        table(["a"], [["x", "y"]])


def test_film_strips_keep_their_width() -> None:
    """A strip of six frames is not pressed into the shape of one image."""
    items = [RankedItem(correct=True, image=picture())]
    plain, film = (
        render_report(run(rank_lists=[RankList(items=items, image=picture(), film=film)])) for film in (False, True)
    )
    assert '<ol class="found film">' in film
    assert '<ol class="found">' in plain
    assert ".found.film img { width: auto;" in film
