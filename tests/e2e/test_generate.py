"""Generation with vLLM itself and the committed small model: the engine alone, and jobs that are killed on the way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reid_dist.config import DataConfig
from reid_dist.data.side import open_side_table
from reid_dist.data.store import TableView, open_view
from reid_dist.generation.engine import EngineConfig, VllmEngine
from reid_dist.generation.guard import start_time
from reid_dist.generation.ledger import Ledger, Unit
from reid_dist.generation.messages import BadInput, Reply, Request, Sampling
from reid_dist.generation.model_folder import find_model
from reid_dist.generation.picture import open_picture
from reid_dist.generation.stages import Answerer, dialogues
from reid_dist.generation.supervise import Supervised
from reid_dist.methods.muva.masks import open_masks
from reid_dist.storage import open_store
from tests.e2e.job import Job
from tests.processes import MARK, assert_all_ended, marked, new_mark
from tests.s3server import S3Server, serve
from tests.small_adapter import write_adapter
from tests.worlds import small_table

pytestmark = pytest.mark.timeout(1200)  # several engines start one after another, each some 10 s on a quiet machine
TABLE = "synthetic-cuhk-pedes"
IMAGES, QUESTIONS = 160, 14
SMALL: dict[str, Any] = {"dtype": "float32", "context": 512, "eager": True, "one_process": True, "parallel": 16}
CAPS = {"type": "array", "items": {"enum": ["cap", "none"]}, "minItems": 2, "maxItems": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    small_table(folder, TABLE, num_train=IMAGES // 2, images_per_id=2)
    return folder


def train_view(root: str) -> TableView:
    return open_view(DataConfig(root=root), (TABLE,), ("train",))


def question(text: str, image: bytes | None = None, **more: Any) -> Request:
    return Request(
        text, Sampling(more.pop("tokens", 1), more.pop("temperature", 0.0), more.pop("seed", None)), image, **more
    )


# ---- the engine alone: one scenario, two starts


class Scenario:
    """What an engine said: plain, and after it was stopped and replaced by one with an adapter."""

    def __init__(self, root: Path, adapter: Path) -> None:
        self.root, self.path = root, find_model("small").path
        config = EngineConfig(path=self.path, **SMALL)
        with_adapter = EngineConfig(path=self.path, adapter=str(adapter), adapter_rank=8, **SMALL)
        self.engines = [VllmEngine(config), VllmEngine(with_adapter)]
        todo = iter(self.engines)
        self.ask = Supervised(lambda: next(todo), stall_s=10, queue=32)
        view = train_view(str(root))
        self.images = view.encoded(range(IMAGES))
        self.digests = view.digests(np.arange(IMAGES))
        self.said: dict[str, Any] = {}
        self.wards: list[tuple[int, str]] = []
        self.struck: Exception | None = None

    async def run(self) -> None:
        image = self.images[0]
        speak = dialogues("tiny")
        work = Answerer(speak, self.ask, lambda row: self.images[row])
        units = [Unit(str(row), {}, {"row": row}) for row in range(IMAGES)]
        described = await asyncio.gather(*(work("describe", unit) for unit in units))
        self.said["described"] = {d: one.value for d, one in zip(self.digests, described, strict=True)}
        self.said["array"] = (await self.ask(question("hat ?", image, tokens=200, schema=CAPS))).text
        self.said["choice"] = (await self.ask(question("hat ?", image, tokens=8, choice=("maybe", "never")))).text
        self.said["prompts"] = [self.prompts(what, image) for what in ("hat ?", "bag ?", "hat ?")]
        bad = {
            "unreadable": (b"none", "hat ?"),
            "long": (image, "hat " * 600),
            "long with picture": (image, "hat " * 504),
        }
        for name, (data, text) in bad.items():
            with pytest.raises(BadInput) as refused:
                await self.ask(question(text, data))
            self.said[name] = str(refused.value)
        assert self.ask.restarted == 0, "a bad request is no illness of the engine"

    def prompts(self, text: str, image: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
        """A prompt about a picture that was asked about before: as the engine makes it, and as vLLM's renderer does."""
        engine = self.engines[0]
        turn, digest = engine._text(question(text, image)), hashlib.sha256(image).hexdigest()
        whole = {"multi_modal_data": {"image": open_picture(image)}, "multi_modal_uuids": {"image": [digest]}}
        made, vllms = engine._prompt(turn, image), engine._render({"prompt": turn, **whole})
        names = ("type", "prompt_token_ids", "mm_placeholders", "mm_hashes", "mm_kwargs")
        return tuple({name: one[name] for name in names} for one in (made, vllms))  # type: ignore[return-value]

    async def strike(self) -> None:
        """Stop every process of the engine; the next one has the adapter."""
        self.said["plain"] = await self.ask_all()
        self.wards = list(self.engines[0]._guard.wards)
        for pid, _ in self.wards:
            os.kill(pid, signal.SIGSTOP)
        self.said["adapted"] = await self.ask_all()
        self.wards += self.engines[1]._guard.wards

    async def whole(self) -> None:
        try:
            await self.run()
            try:
                await self.strike()
            except Exception as error:
                self.struck = error  # for the tests that are about it
        finally:
            await self.ask.close()

    async def ask_all(self) -> list[str]:
        replies: list[Reply] = await asyncio.gather(
            *(self.ask(question(f"{what} ?", image)) for image in self.images[:8] for what in ("hat", "bag", "shoes"))
        )
        return [reply.text for reply in replies]


@pytest.fixture(scope="module")
def scenario(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    found = Scenario(root, write_adapter(tmp_path_factory.mktemp("adapter") / "lora"))
    asyncio.run(found.whole())
    return found


def test_answers_keep_to_a_schema_and_to_a_choice(scenario: Scenario) -> None:
    items = json.loads(scenario.said["array"])
    assert len(items) == 2
    assert set(items) <= {"cap", "none"}
    assert scenario.said["choice"] in ("maybe", "never")


def test_prompts_that_share_a_picture_are_those_that_vllm_renders(scenario: Scenario) -> None:
    for made, vllms in scenario.said["prompts"]:
        assert made == vllms
    (first, _), (second, _), (third, _) = scenario.said["prompts"]
    assert first == third != second


def test_bad_requests_are_refused_readably(scenario: Scenario) -> None:
    assert "cannot be decoded" in scenario.said["unreadable"]
    assert "the context is 512" in scenario.said["long"]
    assert "512" in scenario.said["long with picture"]


def test_a_stalled_engine_is_replaced_and_the_adapter_changes_what_it_says(scenario: Scenario) -> None:
    if scenario.struck:
        raise scenario.struck
    assert scenario.ask.restarted == 1
    plain, adapted = scenario.said["plain"], scenario.said["adapted"]
    assert len(plain) == len(adapted) == 24
    assert plain != adapted


def test_no_process_of_an_engine_is_left(scenario: Scenario) -> None:
    assert len(scenario.wards) >= 2
    assert not [pid for pid, began in scenario.wards if start_time(pid) == began]


# ---- jobs


class Generation(Job):
    """A generation job whose processes can be told."""

    def __init__(self, kind: str, root: str, *words: str, environment: Mapping[str, str] | None = None) -> None:
        self.mark = new_mark()
        if environment is None:
            environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        super().__init__(
            "jobs.generate", kind, TABLE, f"root={root}", "shard=4", "parallel=4", *words,
            environment={**environment, MARK: self.mark},
        )  # fmt: skip

    def done(self) -> dict[str, Any]:
        """The record of a job that succeeded and left no process behind."""
        code, record, err = self.finish(400)
        assert code == 0, err[-3000:]
        assert_all_ended(self.mark)
        return record


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with serve() as server:
        yield server


def copy_tables(root: Path, uri: str) -> None:
    store = open_store(uri)
    for path in (root / "tables").rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(root)), path.read_bytes())


def shards(ledger: str, stage: str = "describe") -> int:
    return len(Ledger(open_store(ledger)).shards(stage))


def answers(root: str) -> dict[str, Any]:
    table, view = open_side_table(root, f"{TABLE}-answers"), train_view(root)
    digests = view.digests(np.arange(len(view)))
    rows = table.lookup([(one,) for one in digests], ["answers"])
    return {digest: row["answers"] for digest, row in zip(digests, rows, strict=True)}


def test_killed_jobs_lose_and_repeat_nothing(root: Path, scenario: Scenario, s3: S3Server) -> None:
    copy_tables(root, s3.uri)
    ledger = f"{s3.uri}/ledger/{TABLE}"
    job = Generation("describe", s3.uri)
    job.wait_for(lambda: shards(ledger) >= 3, 400)
    job.kill()
    assert_all_ended(job.mark)  # an actor works on until it notices
    published = Ledger(open_store(ledger)).read("describe")
    assert 12 <= len(published) < IMAGES

    before = shards(ledger)
    job = Generation("describe", s3.uri)
    job.wait_for(lambda: shards(ledger) >= before + 2, 400)
    actors = marked(job.mark, "MapWorker")
    assert len(actors) == 1, "one engine"
    actors[0].send_signal(signal.SIGKILL)
    record = job.done()
    known = Ledger(open_store(ledger)).read("describe")
    assert record["calls"] == (IMAGES - len(published)) * QUESTIONS, "only what was not published is asked"
    assert {key: one.facts["created"] for key, one in known.items() if key in published} == {
        key: one.facts["created"] for key, one in published.items()
    }
    store = open_store(ledger)
    names = Ledger(store).shards("describe")
    rows = sum(json.loads(store.read(f"{name}.manifest.json"))["rows"] for name in names)
    assert rows == len(known) == IMAGES, "every answer stands once"
    assert answers(s3.uri) == scenario.said["described"], "as if nothing had happened"

    last = Generation("describe", s3.uri)
    again = last.done()
    assert (again["calls"], again["stages"]["describe"]["known"]) == (0, IMAGES)
    assert "Ray cluster" not in last.said(), "nothing to ask, nothing to start"
    stored = json.loads(open_store(ledger).read(f"records/{TABLE}-answers.json"))
    assert (stored["exit_code"], stored["version"]) == (0, again["version"])


def test_masks_come_from_engines_on_ray(root: Path) -> None:
    masks = Generation("masks", str(root), "limit=40", "engines=2").done()
    assert (masks["images"] + masks["error_rows"], masks["stages"]["ground"]["units"]) == (40, 120)
    view = train_view(str(root)).select(np.arange(40))
    found = open_masks(DataConfig(root=str(root)), (f"{TABLE}-masks",), view, (16, 8), ("head", "upper", "legs"))
    assert found.visible(np.arange(40)).any(axis=2).all(), "every part has patches"
