"""`jobs.interact` over made-up embeddings and a scripted model that knows the truth."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs._console import Console
from jobs.interact import Encoded, main, refine
from reid_dist.errors import UserError
from reid_dist.evaluation.ranking import Labels, Scoring, rank_features
from reid_dist.generation.interaction import Policy
from reid_dist.generation.ledger import Ledger, Maker
from reid_dist.generation.messages import Request
from reid_dist.generation.stages import Answerer, InlineRunner, Job, dialogues
from reid_dist.generation.supervise import Supervised
from reid_dist.storage import open_store
from tests.scripted import ScriptedEngine
from tests.tables import jpeg

PEOPLE, PER = 12, 2
SHARES = {"a": 0.5, "b": 0.5}


def made_up(noise: float = 1.6) -> Encoded:
    rng = np.random.default_rng(3)
    truth = {name: rng.normal(size=(PEOPLE, 16)).astype(np.float32) for name in SHARES}
    pids = np.repeat(np.arange(PEOPLE), PER)

    def near(scale: float) -> dict[str, np.ndarray]:
        return {n: v[pids] + scale * rng.normal(size=(len(pids), 16)).astype(np.float32) for n, v in truth.items()}

    def encode(texts: Any) -> dict[str, np.ndarray]:
        """A refined text says who it is; the words before it are the caption's."""
        people = [int(text.split("person ")[1].split()[0].rstrip(".")) for text in texts]
        return {name: values[people] for name, values in truth.items()}

    labels = Labels(pids), Labels(pids)
    images = tuple(f"image-{n}" for n in range(len(pids)))
    texts = tuple(f"text {n} on person {pid} here" for n, pid in enumerate(pids))
    return Encoded(near(noise), near(0.3), texts, np.arange(len(pids)), images, labels, Scoring(), SHARES, encode)


def model(request: Request) -> str:
    """Pictures are their person's number; says what is true."""
    person = request.image.decode() if request.image else ""
    if "fifteen lines" in request.text:
        return "\n".join(f"{n}. This is person {person} indeed." for n in range(1, 16))
    if "witness" in request.text:
        return "The text is about person " + request.text.split("on person ")[1].split()[0] + " and nobody else."
    return "Yes" if f"on person {person} " in request.text else "No"


def job(place: Path, calls: list[Request]) -> Job:
    speak = dialogues("qwen2-vl")
    ask = Supervised(lambda: ScriptedEngine(model, calls), stall_s=5)
    runner = InlineRunner(Answerer(speak, ask, lambda row: str(row // PER).encode()))
    return Job(Ledger(open_store(place)).take(), Maker("m"), speak, runner, runner)


def test_a_truthful_model_mends_the_ranking_and_is_asked_less_than_the_released_loop_asks(tmp_path: Path) -> None:
    encoded, calls = made_up(noise=2.5), []
    policy = Policy(rounds=5, threshold=0.9)
    record = refine(encoded, job(tmp_path, calls), policy, 60)
    plain = rank_features(encoded.query, encoded.gallery, *encoded.labels, Scoring(), weights=SHARES).record()
    assert record["before"]["rank1"] == pytest.approx(plain["rank1"])
    assert record["before"]["mAP"] == pytest.approx(plain["mAP"], abs=1e-5)
    assert record["anchors_right"] == 1.0
    assert 0 < record["accepted"] < len(encoded.texts)
    assert record["after"]["rank1"] > record["before"]["rank1"] + 0.1
    assert record["rounds"][-1] == record["after"]
    assert record["asked"] < record["asked_by_released_loop"]
    described = sum("fifteen lines" in request.text for request in calls)
    assert described < record["accepted"], "an anchor of several queries is described once"
    later: list[Request] = []
    assert refine(encoded, job(tmp_path, later), policy, 60) == record
    assert later == []


def test_nothing_accepted_changes_nothing(tmp_path: Path) -> None:
    encoded = made_up()
    record = refine(encoded, job(tmp_path, []), Policy(rounds=1, threshold=0.999), 60)
    assert record["accepted"] == 0, "a yes on a weak first candidate is distrusted"
    assert record["after"] == record["before"]
    assert record["anchors_right"] is None


def test_weight_one_leaves_all_but_the_anchor(tmp_path: Path) -> None:
    encoded = made_up()
    record = refine(encoded, job(tmp_path, []), Policy(rounds=5, threshold=0.9, weight=1.0), 60)
    assert record["after"] == record["before"]


class Folder:
    def path(self, row: int) -> str:
        return f"{row}.jpg"

    def encoded(self, rows: Any) -> list[bytes]:
        return [jpeg(int(row)) for row in rows]


def test_the_console_asks_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded, page = made_up(noise=0.1), tmp_path / "page.html"
    typed = (
        "somebody like person 3 .\nn\ny\nAlso person 5 .\nsomebody like person 4.\nyes\n\nsomebody like person 2\n\n\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    record = Console(encoded, Folder(), Policy(), "a run", str(page)).run()
    said = capsys.readouterr().err
    assert record == {"descriptions": 3, "page": str(page)}
    first, second, third = said.split("searching with: ")
    assert second.startswith("somebody like person 3. Also person 5 .\n")
    assert third.startswith("somebody like person 4.\n"), "nothing more was seen"
    shown = [line for line in first.splitlines() if ".jpg" in line and "show this" not in line]
    asked = [line.split("does ")[1].split()[0] for line in first.splitlines() if "show this" in line]
    assert asked == [line.split()[-1] for line in shown[: len(asked)]]
    assert first.count("show this person") == 2
    assert len(shown) == 10
    text = page.read_text()
    assert text.count("data:image/jpeg") == 5 * 10, "every ranking with its pictures"
    assert text.index("person 2") < text.index("person 4") < text.index("Also person 5"), "the newest first"


def test_words_are_checked() -> None:
    with pytest.raises(UserError, match="one RUN"):
        main([])
    with pytest.raises(UserError, match="unknown option"):
        main(["run", "--aloud"])


def test_a_text_run_is_encoded_by_its_own_protocol_and_texts_encode_as_captions_do(tmp_path: Path) -> None:
    from jobs.interact import encode
    from reid_dist import methods
    from reid_dist.data.store import open_view
    from reid_dist.methods.spec import TrainingData
    from reid_dist.training.loaded import fresh_model
    from tests.worlds import small_tables

    recipe = methods.load_recipe("comoe/tiny", [f"data.root={tmp_path}"])
    small_tables(tmp_path, recipe)
    spec = methods.get(recipe.method)
    train = open_view(recipe.data, recipe.data.train, ("train",))
    loaded = fresh_model(recipe, spec.facts(TrainingData(train, None)), None, "start")
    whole = open_view(recipe.data, recipe.data.test)
    encoded = encode(loaded, whole)
    test = whole.select(np.asarray(whole.split) == "test")
    assert len(encoded.gallery_rows) == len(test)
    assert sorted(encoded.texts) == sorted(text for texts in test.captions for text in texts)
    assert whole.digests(encoded.gallery_rows) == list(encoded.gallery_images)
    assert set(whole.split[encoded.gallery_rows]) == {"test"}
    for i in (0, len(encoded.texts) - 1):
        row = next(row for row in range(len(test)) if encoded.texts[i] in test.captions[row])
        assert test.pid[row] == encoded.labels[0].pid[i]
    again = encoded.encode(encoded.texts)
    for name, values in encoded.query.items():
        np.testing.assert_allclose(again[name], values, atol=1e-5)
    assert len(encode(loaded, whole, queries=3).texts) == 3
