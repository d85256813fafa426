"""The ledger on a folder and on S3; shards of work; engines that hang or break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from reid_dist.generation.ledger import FencedOut, Ledger, Maker, Record, Unit, make_record
from reid_dist.generation.messages import BadInput, Outcome, Reply, Request, Sampling
from reid_dist.generation.shards import (
    Breaker,
    Outline,
    Progress,
    ShardDone,
    Stage,
    TooManyRejects,
    cut_shards,
    missing_units,
    work_shard,
)
from reid_dist.generation.supervise import EngineDied, Supervised
from reid_dist.storage import AlreadyExists, CorruptionError, Store, open_store
from tests.s3server import serve
from tests.scripted import ScriptedEngine

MAKER = Maker("model-1")
STAGE = Stage("describe", "describe/v1", MAKER)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "folder":
        yield open_store(tmp_path / "ledger")
        return
    with serve() as server:
        yield open_store(f"{server.uri}/ledger")


def unit(number: int) -> Unit:
    inputs = {"image": f"digest-{number}"}
    return Unit(MAKER.key(STAGE.name, STAGE.version, inputs), inputs, {"row": number})


def units(count: int) -> list[Unit]:
    return [unit(number) for number in range(count)]


class Counting:
    """Work that counts; the answer depends on how often anything was asked, as real generation is not repeatable."""

    def __init__(self, bad: set[int] = frozenset()) -> None:
        self.asked: list[int] = []
        self.bad = bad

    async def __call__(self, one: Unit) -> Outcome:
        row = one.payload["row"]
        self.asked.append(row)
        await asyncio.sleep(0)
        if row in self.bad:
            raise BadInput(f"row {row}: the image cannot be decoded")
        return Outcome(
            {"row": row, "call": len(self.asked)}, replies=(Reply("text", prompt_tokens=3, completion_tokens=2),)
        )


def work(ledger: Ledger, todo: list[Unit], job: Counting) -> list[Record]:
    return asyncio.run(work_shard(ledger, STAGE, todo, job, 4))


def test_what_is_published_is_never_asked_again(store: Store) -> None:
    job = Counting(bad={2})
    first = work(Ledger(store).take(), units(5), job)
    assert sorted(job.asked) == [0, 1, 2, 3, 4]
    known = Ledger(store).read("describe")
    assert {key: record.value for key, record in known.items()} == {r.key: r.value for r in first}
    assert missing_units(units(5), known, retry_errors=False) == []
    assert missing_units(units(7), known, retry_errors=True) == [unit(2), unit(5), unit(6)]
    record = known[unit(2).key]
    assert (record.usable, record.reason) == (False, "row 2: the image cannot be decoded")
    assert known[unit(0).key].facts["replies"][0]["completion_tokens"] == 2


def test_a_shard_is_published_once_and_the_second_writer_takes_the_first_ones_answers(store: Store) -> None:
    ledger = Ledger(store).take()
    first, second = (
        [make_record(one, Outcome(value), STAGE.name, STAGE.version, MAKER) for one in units(3)] for value in ("a", "b")
    )
    assert [r.value for r in ledger.publish("describe", first)] == ["a"] * 3
    assert [r.value for r in ledger.publish("describe", second)] == ["a"] * 3
    assert {r.value for r in Ledger(store).read("describe").values()} == {"a"}
    job = Counting()
    assert [r.value for r in work(ledger, units(3), job)] == ["a"] * 3
    assert job.asked == []


def test_an_unpublished_shard_does_not_exist(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(store).take()
    write = type(store).write

    def dies_before_the_manifest(self: Store, key: str, data: bytes, **options: bool) -> None:
        if "manifest" in key:
            raise KeyboardInterrupt
        write(self, key, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "write", dies_before_the_manifest)
        with pytest.raises(KeyboardInterrupt):
            work(ledger, units(3), Counting())
    assert Ledger(store).read("describe") == {}
    job = Counting()
    work(Ledger(store).take(), units(3), job)
    assert len(Ledger(store).read("describe")) == len(job.asked) == 3


def test_a_newer_attempt_fences_the_older_one_out(store: Store) -> None:
    old = Ledger(store).take()
    new = Ledger(store).take()
    assert (old.attempt, new.attempt) == (1, 2)
    with pytest.raises(FencedOut, match="replaced"):
        work(old, units(2), Counting())
    assert Ledger(store).read("describe") == {}
    with pytest.raises(ValueError, match="take"):
        Ledger(store).publish("describe", [])


def test_two_jobs_cannot_take_the_same_number(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(store), "list", lambda self, prefix="": [])
    Ledger(store).take()
    with pytest.raises(FencedOut, match="another job"):
        Ledger(store).take()
    with pytest.raises(AlreadyExists):
        store.write("attempts/0001.json", b"", if_absent=True)


def test_an_answer_wins_over_an_error_and_the_first_answer_over_later_ones(store: Store) -> None:
    def publish(value: str, status: str) -> None:
        record = make_record(unit(0), Outcome(value, status), STAGE.name, STAGE.version, MAKER)  # type: ignore[arg-type]
        Ledger(store).take().publish("describe", [record])

    publish("", "error")
    publish("first", "ok")
    publish("second", "ok")
    publish("", "error")
    assert Ledger(store).read("describe")[unit(0).key].value == "first"


def test_damage_is_seen(store: Store) -> None:
    work(Ledger(store).take(), units(2), Counting())
    shard = next(entry.key for entry in store.list("describe/") if entry.key.endswith(".gz"))
    data = store.read(shard)
    store.write(shard, data[:-1] + b"x")
    with pytest.raises(CorruptionError, match="not the ones"):
        Ledger(store).read("describe")
    store.delete(shard)
    with pytest.raises(CorruptionError, match="gone"):
        Ledger(store).read("describe")


def test_keys_hold_everything_that_changes_an_answer() -> None:
    makers = [MAKER, Maker("model-2"), Maker("model-1", "adapter"), Maker("model-1", settings={"pixels": 1})]
    keys = [maker.key("describe", "v1", {"image": "a"}) for maker in makers]
    keys += [MAKER.key("merge", "v1", {"image": "a"}), MAKER.key("describe", "v2", {"image": "a"}),
             MAKER.key("describe", "v1", {"image": "b"})]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert MAKER.key("s", "v", {"a": 1, "b": "\u00e9"}) == MAKER.key("s", "v", {"b": "\u00e9", "a": 1})


def test_records_survive_their_line() -> None:
    odd = Outcome({"text": "line\nbreak \u2028 \U0001f600"}, "partial", "why")
    record = make_record(unit(0), odd, STAGE.name, STAGE.version, MAKER)
    assert "\n" not in record.line()
    assert Record.parse(record.line()) == record
    assert json.loads(record.line())["inputs"] == {"image": "digest-0"}


def test_shards_hold_every_key_once() -> None:
    cut = cut_shards([*units(5), unit(0)], 2)
    assert [len(shard) for shard in cut] == [2, 2, 1]
    assert len({one.key for shard in cut for one in shard}) == 5


def test_rows_under_way_are_bounded(tmp_path: Path) -> None:
    now = most = 0

    async def slow(one: Unit) -> Outcome:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return Outcome(one.payload["row"])

    ledger = Ledger(open_store(tmp_path)).take()
    asyncio.run(work_shard(ledger, STAGE, units(20), slow, 3))
    assert most == 3


def test_a_failing_engine_ends_the_shard_and_asks_nothing_more(tmp_path: Path) -> None:
    asked = []

    async def breaks(one: Unit) -> Outcome:
        asked.append(one.payload["row"])
        await asyncio.sleep(0.001)
        if one.payload["row"] == 1:
            raise EngineDied("gone")
        await asyncio.sleep(5)
        return Outcome("never")

    ledger = Ledger(open_store(tmp_path)).take()
    with pytest.raises(EngineDied):
        asyncio.run(work_shard(ledger, STAGE, units(20), breaks, 2))
    assert len(asked) <= 4
    assert ledger.read("describe") == {}


def test_breaker_trips_on_a_share_of_the_last_answers() -> None:
    breaker = Breaker(share=0.1, window=20)
    for number in range(100):
        breaker.note("split", "fallback" if number % 10 == 0 else "ok", "malformed")
    breaker.note("split", "fallback", "malformed")
    with pytest.raises(TooManyRejects, match="3 of the last 20"):
        breaker.note("split", "fallback", "malformed")
    young = Breaker(share=0.1, window=20)
    for _ in range(19):
        young.note("split", "error", "x")


def test_progress_counts_calls_tokens_and_rejects(tmp_path: Path) -> None:
    progress = Progress("describe", 5)
    assert "0/5 rows" in progress.line()
    records = work(Ledger(open_store(tmp_path)).take(), units(5), Counting(bad={1, 2}))
    outlines = [Outline.of(record) for record in records]
    progress.note(ShardDone(outlines[:2], "one", 100.0, 103.0))
    assert "2/5 rows, 0.7 rows/s, 4 s left" in progress.line()
    progress.note(ShardDone(outlines[2:], "two", 101.0, 110.0))
    summary = progress.summary()
    assert (summary["working_seconds"], summary["workers"]) == (10.0, 2)
    assert (summary["calls"], summary["prompt_tokens"], summary["completion_tokens"]) == (3, 9, 6)
    assert summary["statuses"] == {"ok": 3, "error": 2}
    assert summary["rejects"] == {"row 1": 1, "row 2": 1}
    assert "5/5 rows, 0.5 rows/s, 0 s left" in progress.line()


def request(text: str) -> Request:
    return Request(text, Sampling(8))


@pytest.mark.parametrize("trouble", ["hang", "fail"])
def test_a_stalled_or_broken_engine_is_restarted_and_asked_again(trouble: str) -> None:
    calls: list[Request] = []
    engines: list[ScriptedEngine] = []

    def make() -> ScriptedEngine:
        engines.append(ScriptedEngine(lambda r: r.text.upper(), calls, **{trouble: {3}}))
        return engines[-1]

    async def run() -> list[Reply]:
        ask = Supervised(make, stall_s=0.2)
        replies = await asyncio.gather(*(ask(request(f"t{n}")) for n in range(8)))
        await ask.close()
        await ask.close()
        assert ask.restarted == 1
        return replies

    assert [reply.text for reply in asyncio.run(run())] == [f"T{n}" for n in range(8)]
    assert [engine.started for engine in engines] == [engine.closed for engine in engines] == [1, 1]
    assert len(calls) == 9


def test_a_stall_is_silence_not_a_long_wait() -> None:
    """Six requests of 0.1 s one after another: none is a stall of 0.25 s, though the last waits longer than that."""
    calls: list[Request] = []
    most = 0

    class OneAtATime(ScriptedEngine):
        turn = asyncio.Lock()

        async def generate(self, one: Request) -> Reply:
            nonlocal most
            calls.append(one)
            most = max(most, len(calls) - done)
            async with self.turn:
                await asyncio.sleep(0.1)
            return Reply(one.text)

    done = 0

    async def run() -> int:
        nonlocal done
        ask = Supervised(lambda: OneAtATime(str, calls), stall_s=0.25, queue=4)

        async def one(number: int) -> None:
            nonlocal done
            await ask(request(f"t{number}"))
            done += 1

        await asyncio.gather(*(one(n) for n in range(6)))
        await ask.close()
        return ask.restarted

    assert asyncio.run(run()) == 0
    assert len(calls) == 6
    assert most == 4, "the queue is bounded"


def test_an_idle_engine_is_no_stalled_one_and_a_request_given_up_is_forgotten() -> None:
    calls: list[Request] = []

    async def run() -> int:
        ask = Supervised(lambda: ScriptedEngine(str, calls, hang={1}), stall_s=0.2)
        await ask(request("a"))
        await asyncio.sleep(0.15)
        given_up = asyncio.ensure_future(ask(request("b")))
        await asyncio.sleep(0.1)  # longer than a stall after the first answer, shorter than one after the question
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await asyncio.sleep(0.3)
        await ask(request("c"))
        await ask.close()
        return ask.restarted

    assert asyncio.run(run()) == 0
    assert [call.text for call in calls] == ["a", "b", "c"]


def test_requests_on_an_ended_engine_move_to_the_next_one() -> None:
    """The first engine never answers anybody; the second answers at once, and its answers are no sign of the first."""
    calls: list[Request] = []
    engines = [ScriptedEngine(str.upper, calls, hang=set(range(3)))]

    def make() -> ScriptedEngine:
        engines.append(ScriptedEngine(lambda r: r.text, calls))
        return engines[len(engines) - 2]

    async def run() -> tuple[list[str], int]:
        ask = Supervised(make, stall_s=0.3)
        early = [asyncio.ensure_future(ask(request(f"t{n}"))) for n in range(3)]
        await asyncio.sleep(0.4)
        late = []
        while not all(one.done() for one in early) and len(late) < 200:
            late.append(await ask(request("late")))
            await asyncio.sleep(0.01)
        texts = [one.result().text for one in early]
        await ask.close()
        return texts, ask.restarted

    assert asyncio.run(asyncio.wait_for(run(), 10)) == (["t0", "t1", "t2"], 1)


def test_restarts_are_bounded_and_bad_input_is_no_illness() -> None:
    calls: list[Request] = []

    async def run(ask: Supervised) -> None:
        try:
            await ask(request("a"))
        finally:
            await ask.close()

    ask = Supervised(lambda: ScriptedEngine(str, calls, fail=set(range(100))), stall_s=1, restarts=2)
    with pytest.raises(EngineDied, match="restarted 2 times"):
        asyncio.run(run(ask))
    assert len(calls) == 3

    calls.clear()
    many = Supervised(lambda: ScriptedEngine(str, calls, fail=set(range(100))), stall_s=1, restarts=0)

    async def all_fail() -> list[object]:
        return await asyncio.gather(*(many(request(f"t{n}")) for n in range(20)), return_exceptions=True)

    assert {type(error) for error in asyncio.run(all_fail())} == {EngineDied}
    assert len(calls) <= 20, "nobody starts another engine for the requests that were left"

    def refuses(_: Request) -> str:
        raise BadInput("too long")

    ask = Supervised(lambda: ScriptedEngine(refuses, []), stall_s=1)
    with pytest.raises(BadInput):
        asyncio.run(run(ask))
    assert ask.restarted == 0


def test_an_engine_that_does_not_start_is_tried_once() -> None:
    made = []

    class Stillborn(ScriptedEngine):
        async def start(self) -> None:
            made.append(self)
            raise OSError("no memory")

    class Sick(ScriptedEngine):
        async def check(self) -> None:
            made.append(self)
            raise RuntimeError("not well")

    for kind, words in ((Stillborn, "no memory"), (Sick, "not well")):
        made.clear()
        ask = Supervised(lambda kind=kind: kind(str, []), stall_s=1)

        async def run(ask: Supervised = ask) -> list[object]:
            return await asyncio.gather(*(ask(request(f"t{n}")) for n in range(5)), return_exceptions=True)

        errors = asyncio.run(run())
        assert {type(error) for error in errors} == {EngineDied}
        assert words in str(errors[0])
        assert [engine.closed for engine in made] == [1]
