"""Enrichment, search and grounding over a scripted model: who is asked what, and that nothing is asked twice."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest

from reid_dist.errors import UserError
from reid_dist.generation.interaction import NO_ANCHOR, Policy, blended, place_anchors, rerank
from reid_dist.generation.ledger import Ledger, Maker
from reid_dist.generation.messages import BadInput, Reply, Request
from reid_dist.generation.prompts import TOPICS
from reid_dist.generation.shards import TooManyRejects
from reid_dist.generation.stages import Answerer, InlineRunner, Job, Query, dialogues, enrich, seen_picture
from reid_dist.generation.supervise import Supervised
from reid_dist.storage import open_store
from tests.scripted import ScriptedEngine

ROWS = [("img-a", 0, ["a man in red walks here", "a tall man walks here"]), ("img-b", 1, ["a man in red walks here"])]


def answer(request: Request) -> str:
    """A model that complies. Pictures are b"0", b"1", ..."""
    text = request.text
    if request.image == b"broken":
        return ""
    if "fifteen lines" in text:
        number = request.image.decode() if request.image else "?"
        return "\n".join(
            f"{n}. The person has {topic.split(':')[0]} of kind {number}." for n, topic in enumerate(TOPICS, 1)
        )
    if "witness" in text:
        first = json.loads(re.search(r"Entries: (\[.*\])", text)[1])
        return f"{first[0]} and {first[1].lower().rstrip('.')}."
    if "Break the" in text:
        said = json.loads(re.search(r'Description: (".*")', text)[1])
        return json.dumps(["The person is male.", f"It was said {said}"])
    if "different wordings" in text:
        said = json.loads(re.search(r'Sentence: (".*")', text)[1])
        return json.dumps([f"{said} Version {n}." for n in range(5)])
    if "bounding box" in text:
        return "(100,100),(500,300)" if "head" in text else "nothing"
    wanted = json.loads(re.search(r'Description: (".*?")\. Does', text)[1])
    return "Yes" if request.image and request.image.decode() in wanted else "No"


def make_job(place: Path, calls: list[Request], images: dict[int, bytes] | None = None, **options: bool) -> Job:
    speak = dialogues("qwen2-vl")
    pictures = images or {row: str(row).encode() for row in range(10)}
    ask = Supervised(lambda: ScriptedEngine(answer, calls), stall_s=5)
    runner = InlineRunner(Answerer(speak, ask, pictures.__getitem__))
    return Job(Ledger(open_store(place)).take(), Maker("model-1"), speak, runner, runner, shard=2, **options)


def test_enrichment_asks_each_image_and_each_sentence_once_and_a_second_run_nothing(tmp_path: Path) -> None:
    calls: list[Request] = []
    job = make_job(tmp_path, calls)
    found, lost = enrich(job, ROWS, 60)
    assert lost == []
    assert [(one.image, one.caption) for one in found] == [(i, c) for i, _, cs in ROWS for c in cs]
    assert {name: done["calls"] for name, done in job.summaries.items()} == {
        "describe": 2, "merge": 3, "split": 3, "paraphrase": 4,
    }  # fmt: skip
    first = found[0].groups
    assert first[0][0] == "The person is male."
    assert len(first[0]) == 6
    assert "gender of kind 0" in first[1][0]
    assert found[1].groups[0] == first[0], "one sentence, one set of wordings"
    again, _ = enrich(make_job(tmp_path, later := []), ROWS, 60)
    assert later == []
    assert again == found
    more = [*ROWS, ("img-c", 2, ["a man in red walks here"])]
    enrich(make_job(tmp_path, later), more, 60)
    assert len(later) == 4, "one description, merge, split, and one sentence that nobody has reworded"


def test_a_broken_picture_becomes_an_error_row_and_is_asked_again_only_when_told(tmp_path: Path) -> None:
    from reid_dist.generation.picture import open_picture

    calls: list[Request] = []
    job = make_job(tmp_path, calls)

    def refuses(row: int) -> bytes:
        if row == 1:
            open_picture(b"no picture")
        return b"0"

    speak = job.speak
    broken = InlineRunner(Answerer(speak, Supervised(lambda: ScriptedEngine(answer, calls), 5), refuses))
    job.runner = job.rules = broken
    found, lost = enrich(job, ROWS, 60)
    assert lost == ["img-b"]
    assert {one.image for one in found} == {"img-a"}
    assert job.summaries["describe"]["rejects"] == {"the image cannot be decoded": 1}
    still, lost = enrich(make_job(tmp_path, later := []), ROWS, 60)
    assert (lost, later, still) == (["img-b"], [], found)
    mended, lost = enrich(make_job(tmp_path, later, retry_errors=True), ROWS, 60)
    assert lost == []
    assert len(mended) == 3
    with pytest.raises(BadInput, match="8 each way"):
        open_picture(_png(4, 20))


def _png(height: int, width: int) -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_search_asks_a_query_only_what_can_change_it(tmp_path: Path) -> None:
    calls: list[Request] = []
    job = make_job(tmp_path, calls)
    images, rows = tuple(f"img-{n}" for n in range(4)), (0, 1, 2, 3)
    queries = [
        Query("person 0", True, images, rows), Query("person 2", True, images, rows),
        Query("person 0", False, images, rows), Query("person 2", False, images, rows),
        Query("person 9", False, images, rows),
    ]  # fmt: skip
    values = [record.value for record in job.search(queries)]
    assert [(v["place"], v["round"], len(v["answers"])) for v in values] == [
        (0, 1, 1), (-1, 0, 1), (-1, 0, 1), (2, 3, 3), (-1, 0, 4),
    ]  # fmt: skip
    assert len(calls) == 10
    later: list[Request] = []
    assert [record.value for record in make_job(tmp_path, later).search(queries)] == values
    assert later == []


def test_boxes_in_pixels_are_of_the_picture_as_the_model_saw_it(tmp_path: Path) -> None:
    speak = dialogues("qwen2.5-vl")
    said = '[{"bbox_2d": [56, 91, 112, 182], "label": "head"}]'
    ask = Supervised(lambda: ScriptedEngine(lambda request: said, []), stall_s=5)
    for pixels, box in ((50176, [0.5, 0.25, 1.0, 0.5]), (0, [56 / 128, 91 / 384, 112 / 128, 182 / 384])):
        runner = InlineRunner(Answerer(speak, ask, lambda row: _png(384, 128), pixels))
        job = Job(Ledger(open_store(tmp_path / str(pixels))).take(), Maker("m"), speak, runner, runner)
        assert job.ground({"a": 0})["a"]["head"].value == [pytest.approx(box)]
    with pytest.raises(BadInput, match="decoded"):
        seen_picture(b"no picture", 0)


def test_grounding_gives_boxes_per_part(tmp_path: Path) -> None:
    found = make_job(tmp_path, [], images={0: _png(384, 128)}).ground({"img-a": 0})
    assert found["img-a"]["head"].value == [[0.1, 0.1, 0.5, 0.3]]
    assert (found["img-a"]["legs"].value, found["img-a"]["legs"].status) == ([], "fallback")


def test_the_small_models_rules_ask_nobody_and_say_so(tmp_path: Path) -> None:
    speak = dialogues("tiny")
    calls: list[Request] = []

    def word(request: Request) -> str:
        return "hidden" if "hat" in request.text else "black" if "colour" in request.text else "short"

    ask = Supervised(lambda: ScriptedEngine(word, calls), stall_s=5)
    runner = InlineRunner(Answerer(speak, ask, lambda row: b"x"))
    job = Job(Ledger(open_store(tmp_path)).take(), Maker("small-1"), speak, runner, runner)
    found, _ = enrich(job, [("img-a", 0, ["A person is wearing a red shirt."])], 60)
    assert {name: done["calls"] for name, done in job.summaries.items() if name != "describe"} == {
        "merge": 0, "split": 0, "paraphrase": 0,
    }  # fmt: skip
    assert all(speak.versions[name].startswith("rule-") for name in speak.rules)
    assert any("black hair" in group[0] for group in found[0].groups)
    assert job.summaries["describe"]["statuses"] == {"partial": 1}, (
        "a word that is no answer to its question is not taken"
    )
    other = Job(Ledger(open_store(tmp_path)).take(), Maker("small-2"), speak, runner, runner)
    enrich(other, [("img-a", 0, ["A person is wearing a red shirt."])], 60)
    assert other.summaries["split"]["known"] == 1, "a rule does not depend on the model"
    assert other.summaries["describe"]["known"] == 0


def test_blending_in_blocks_with_shares() -> None:
    rng = np.random.default_rng(0)
    make = lambda n: {"a": rng.normal(size=(n, 4)).astype("f4"), "b": rng.normal(size=(n, 6)).astype("f4")}  # noqa: E731
    query, refined, gallery = make(5), make(5), make(7)
    anchors = np.array([-1, 0, 6, 3, -1])
    shares = {"a": 0.3, "b": 0.7}
    scores = rerank(query, refined, gallery, anchors, 0.8, shares)

    def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (one / np.linalg.norm(one, axis=1)[:, None]) @ (other / np.linalg.norm(other, axis=1)[:, None]).T

    base, other = (sum(w * cosine(side[n], gallery[n]) for n, w in shares.items()) for side in (query, refined))
    for row, anchor in enumerate(anchors):
        expected = base[row]
        if anchor != NO_ANCHOR:
            new = other[row].copy()
            new[anchor] = 1
            expected = 0.8 * base[row] + 0.2 * new
        np.testing.assert_allclose(scores[row], expected, atol=1e-6)
    assert blended(query, refined, anchors, 1.0)["a"] == pytest.approx(
        blended(query, query, anchors, 0.5)["a"], abs=1e-6
    )
    assert place_anchors(np.zeros((1, 2)), np.array([0.5]), np.array([1]), 0.8).tolist() == [[0, pytest.approx(0.6)]]


def test_bad_policies_and_families_are_refused() -> None:
    for wrong in ({"rounds": 0}, {"weight": 1.5}):
        with pytest.raises(UserError, match="="):
            Policy(**wrong)
    with pytest.raises(UserError, match="choose"):
        dialogues("nobody")


def test_an_engine_shared_by_shards_is_asked_together() -> None:
    """Requests of several units are under way at once, so an engine can batch them."""
    now = most = 0

    async def ask(request: Request) -> Reply:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.001)
        now -= 1
        return Reply("black")

    answerer = Answerer(dialogues("tiny"), ask, lambda row: b"x")
    unit = Job(Ledger(open_store("unused")), Maker("m"), answerer.speak, None, None).unit("describe", {}, {"row": 0})  # type: ignore[arg-type]
    asyncio.run(answerer("describe", unit))
    assert most == 14


def test_a_stage_with_too_many_rejects_stops_and_keeps_what_was_answered(tmp_path: Path) -> None:
    """One sentence in ten is refused by the model: after a thousand answers the job ends, and says why."""
    calls: list[Request] = []

    def refuses_some(request: Request) -> str:
        return (
            "I'm sorry, I cannot do that." if re.search(r"Sentence: \"number \d*7\.", request.text) else answer(request)
        )

    def job() -> Job:
        ask = Supervised(lambda: ScriptedEngine(refuses_some, calls), stall_s=5)
        runner = InlineRunner(Answerer(dialogues("qwen2-vl"), ask, lambda row: b""))
        return Job(Ledger(open_store(tmp_path)).take(), Maker("m"), dialogues("qwen2-vl"), runner, runner, shard=100)

    sentences = [f"number {n}." for n in range(1300)]
    stopped = job()
    with pytest.raises(TooManyRejects, match=r"stage paraphrase: 100 of the last 1000 .* \(last: refused\)"):
        stopped.paraphrase(sentences)
    kept = Ledger(open_store(tmp_path)).read("paraphrase")
    assert len(kept) == 1000
    calls.clear()
    rest = job()
    rest.paraphrase(sentences[:1100])
    assert len(calls) == 100 + 10 * 2, "only what is missing, and its ten refusals twice more"
    assert len(rest.rejects(200)) == 110
    assert {(stage, record.reason) for stage, record in rest.rejects()} == {("paraphrase", "refused")}
