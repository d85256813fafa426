"""The stages over the pictures of a view: which units there are, and what each asks. Image stages are keyed by image digest,
so captions of one image share its description; paraphrases by the sentence alone, so a corpus asks each sentence once.

    enrich   describe (image) -> merge (caption + answers) -> split (text) -> paraphrase (sentence) -> groups per caption
    ground   image + part -> boxes
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reid_dist.generation.dialogues import Dialogues, ModelDialogues, observations
from reid_dist.generation.image_budget import FACTOR, seen_size
from reid_dist.generation.interaction import Policy, find_anchor
from reid_dist.generation.ledger import Ledger, Maker, Record, Unit
from reid_dist.generation.messages import Ask, Outcome, Reply
from reid_dist.generation.parsing import normalised
from reid_dist.generation.picture import open_picture
from reid_dist.generation.prompts import family
from reid_dist.generation.shards import (
    Breaker,
    Outline,
    Progress,
    ShardDone,
    Stage,
    cut_shards,
    missing_units,
    work_shard,
)

PARTS = ("head", "upper", "legs")
Images = Callable[[int], bytes]  # row -> encoded image


def dialogues(name: str, answers: str = "strict") -> Dialogues:
    """The dialogues of a prompt family. Raises UserError."""
    prompts = family(name)
    if prompts.merge is None:
        from reid_dist.generation.tiny.dialogue import TinyDialogues

        return TinyDialogues(prompts)
    return ModelDialogues(prompts, "legacy" if answers == "legacy" else "strict")


@dataclass(frozen=True)
class Answerer:
    """The work of one unit of any stage."""

    speak: Dialogues
    ask: Ask
    images: Images
    pixels: int = (
        0  # budget of every picture, for boxes in pixels of what the model saw; 0: it saw the picture as it is
    )

    async def __call__(self, stage: str, unit: Unit) -> Outcome:
        """Raises BadInput, and what the engine raises."""
        data = unit.payload
        if stage == "describe":
            return await self.speak.describe(self.ask, await self._image(data))
        if stage == "locate":
            return await self.speak.locate(self.ask, await self._image(data), data["text"])
        if stage == "search":
            return await self._search(data)
        if stage == "ground":
            image = await self._image(data)
            return await self.speak.ground(self.ask, image, data["part"], seen_picture(image, self.pixels))
        if stage == "merge":
            return await self.speak.merge(self.ask, data["caption"], data["answers"], data["max_words"])
        if stage == "split":
            return await self.speak.split(self.ask, data["text"])
        if stage == "paraphrase":
            return await self.speak.paraphrase(self.ask, data["sentence"])
        raise ValueError(f"there is no stage {stage!r}")

    async def _image(self, data: Mapping[str, Any]) -> bytes:
        return await asyncio.to_thread(self.images, int(data["row"]))

    async def _search(self, data: Mapping[str, Any]) -> Outcome:
        """One query through all its rounds. Value: {"place": of the anchor among the candidates, -1; "round", "answers"}."""
        rows = [int(row) for row in data["rows"]]
        replies: list[Reply] = []
        doubtful: list[str] = []

        async def shown(place: int) -> bool:
            image = await asyncio.to_thread(self.images, rows[place])
            outcome = await self.speak.locate(self.ask, image, data["text"])
            replies.extend(outcome.replies)
            doubtful.append(outcome.reason)
            return bool(outcome.value)

        policy = Policy(rounds=len(rows), threshold=0.0)
        top = 1.0 if data["confident"] else -1.0
        found = await find_anchor(top, range(len(rows)), shown, policy)
        value = {"place": found.anchor, "round": found.round, "answers": list(found.answers)}
        reasons = [reason for reason in doubtful if reason]
        if reasons:
            return Outcome(value, "fallback", reasons[0], tuple(replies))
        return Outcome(value, replies=tuple(replies))


def seen_picture(image: bytes, pixels: int) -> tuple[int, int]:
    """(height, width) of a picture as the model sees it. Raises BadInput when it cannot be read."""
    width, height = open_picture(image).size
    return seen_size(height, width, FACTOR, pixels, pixels) if pixels else (height, width)


class Runner(Protocol):
    """Where shards are worked on: Ray (engine.py), or this process for rules and tests."""

    def run(self, ledger: Ledger, stage: Stage, shards: Sequence[list[Unit]]) -> Iterator[ShardDone]:
        """Work on and publish all shards; yields each one's report as it is done."""
        ...


@dataclass(frozen=True)
class InlineRunner:
    """In this process, one shard after another. `drive` runs a coroutine to its end: a loop's own `run_until_complete` for an
    engine that lives longer than a shard.
    """

    answerer: Answerer
    parallel: int = 64
    drive: Callable[[Coroutine[Any, Any, list[Record]]], list[Record]] = asyncio.run

    def run(self, ledger: Ledger, stage: Stage, shards: Sequence[list[Unit]]) -> Iterator[ShardDone]:
        """As Runner says."""
        for shard in shards:
            began = time.time()
            records = self.drive(
                work_shard(ledger, stage, shard, lambda unit: self.answerer(stage.name, unit), self.parallel)
            )
            yield ShardDone([Outline.of(record) for record in records], "here", began, time.time())


@dataclass(frozen=True, slots=True)
class Query:
    """A description and its candidates, best first: image digests and rows of the view. `confident`: the first one's
    similarity is above the threshold.
    """

    text: str
    confident: bool
    images: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass
class Job:
    """Stages over one ledger. `note` is called with every shard's progress; `summaries` holds what each stage did."""

    ledger: Ledger
    maker: Maker
    speak: Dialogues
    runner: Runner
    rules: Runner
    retry_errors: bool = False
    shard: int = 256
    note: Callable[[Progress], None] = lambda progress: None

    def __post_init__(self) -> None:
        self.summaries: dict[str, dict[str, Any]] = {}
        self._rejected: dict[str, list[Record]] = {}

    def unit(self, stage: str, inputs: Mapping[str, Any], payload: Mapping[str, Any]) -> Unit:
        """A unit with its content key. Rules depend on no model, so their keys name none."""
        maker = Maker("") if stage in self.speak.rules else self.maker
        return Unit(maker.key(stage, self.speak.versions[stage], inputs), inputs, payload)

    def answer(self, stage: str, units: Iterable[Unit]) -> dict[str, Record]:
        """All records of these units; only those that are missing are asked for. Raises RunError."""
        unique = {unit.key: unit for unit in units}
        known = self.ledger.read(stage, unique)
        missing = missing_units(unique.values(), known, self.retry_errors)
        progress, breaker = Progress(stage, len(missing)), Breaker()
        if missing:
            runner = self.rules if stage in self.speak.rules else self.runner
            described = Stage(stage, self.speak.versions[stage], self.maker)
            for done in runner.run(self.ledger, described, cut_shards(missing, self.shard)):
                progress.note(done)
                self.note(progress)
                for outline in done.outlines:
                    breaker.note(stage, outline.status, outline.reason)
            known = self.ledger.read(stage, unique)
        self.summaries[stage] = {"known": len(unique) - len(missing), **progress.summary()}
        self._rejected[stage] = [known[key] for key in sorted(unique) if known[key].status != "ok"]
        return {key: known[key] for key in unique}

    def rejects(self, most: int = 50) -> list[tuple[str, Record]]:
        """(stage, record) of what was not accepted in the stages of this job, the first `most` by key."""
        return [(stage, record) for stage, records in self._rejected.items() for record in records][:most]

    def image_units(self, stage: str, images: Mapping[str, int]) -> dict[Any, Unit]:
        """The units of a stage that asks about pictures alone: by digest, or by (digest, part) where it asks about parts.

        images: digest -> row.
        """
        if stage == "describe":
            return {d: self.unit(stage, {"image": d}, {"row": row}) for d, row in images.items()}
        return {
            (d, part): self.unit(stage, {"image": d, "part": part}, {"row": row, "part": part})
            for d, row in images.items()
            for part in PARTS
        }

    # ---- stages

    def describe(self, images: Mapping[str, int]) -> dict[str, Record]:
        """Answers by image digest. images: digest -> row."""
        units = self.image_units("describe", images)
        records = self.answer("describe", units.values())
        return {d: records[unit.key] for d, unit in units.items()}

    def locate(self, pairs: Iterable[tuple[str, int, str]]) -> dict[tuple[str, str], Record]:
        """Yes or no by (image digest, text) of (image digest, row, text)."""
        units = {(d, t): self.unit("locate", {"image": d, "text": t}, {"row": row, "text": t}) for d, row, t in pairs}
        records = self.answer("locate", units.values())
        return {pair: records[unit.key] for pair, unit in units.items()}

    def search(self, queries: Sequence[Query]) -> list[Record]:
        """How each query went (Answerer says what the value is), in order. All rounds of a query are one unit."""
        units = []
        for query in queries:
            inputs = {"text": query.text, "confident": query.confident, "images": list(query.images)}
            payload = {"text": query.text, "confident": query.confident, "rows": list(query.rows)}
            units.append(self.unit("search", inputs, payload))
        records = self.answer("search", units)
        return [records[unit.key] for unit in units]

    def ground(self, images: Mapping[str, int]) -> dict[str, dict[str, Record]]:
        """Boxes by image digest and part."""
        units = self.image_units("ground", images)
        records = self.answer("ground", units.values())
        found: dict[str, dict[str, Record]] = {}
        for unit in units.values():
            found.setdefault(unit.inputs["image"], {})[unit.inputs["part"]] = records[unit.key]
        return found

    def merge(self, pairs: Sequence[tuple[str, Sequence[str]]], max_words: int) -> list[Record]:
        """Merged texts of (caption, observations), in order."""
        units = []
        for caption, answers in pairs:
            inputs = {"caption": caption, "answers": list(answers), "max_words": max_words}
            units.append(self.unit("merge", inputs, inputs))
        records = self.answer("merge", units)
        return [records[unit.key] for unit in units]

    def split(self, texts: Sequence[str]) -> list[Record]:
        """Sentences of each text, in order."""
        units = [self.unit("split", {"text": text}, {"text": text}) for text in texts]
        records = self.answer("split", units)
        return [records[unit.key] for unit in units]

    def paraphrase(self, sentences: Iterable[str]) -> dict[str, Record]:
        """Wordings by normalised sentence."""
        units = {}
        for sentence in sentences:
            form = normalised(sentence)
            if form not in units:
                units[form] = self.unit("paraphrase", {"sentence": form}, {"sentence": sentence})
        records = self.answer("paraphrase", units.values())
        return {form: records[unit.key] for form, unit in units.items()}


@dataclass(frozen=True, slots=True)
class Enriched:
    """One caption of one image after all stages."""

    image: str  # digest
    caption: str
    answers: tuple[str, ...]  # about the picture
    merged: str
    groups: tuple[tuple[str, ...], ...]


def enrich(
    job: Job, rows: Sequence[tuple[str, int, Sequence[str]]], max_words: int
) -> tuple[list[Enriched], list[str]]:
    """(captions with their groups, digests of images that could not be asked about) of (image digest, row, captions)."""
    described = job.describe({image: row for image, row, _ in rows})
    lost = sorted(image for image, record in described.items() if not record.usable)
    pairs = [(image, caption) for image, _, captions in rows if described[image].usable for caption in captions]
    pairs = list(dict.fromkeys(pairs))
    told = [(caption, observations(described[image].value)) for image, caption in pairs]
    texts = [str(record.value) for record in job.merge(told, max_words)]
    pieces = [list(record.value) for record in job.split(texts)]
    worded = job.paraphrase(sentence for sentences in pieces for sentence in sentences)
    result = []
    for (image, _), (caption, answers), text, sentences in zip(pairs, told, texts, pieces, strict=True):
        groups = [tuple(_group(sentence, worded[normalised(sentence)])) for sentence in sentences]
        result.append(Enriched(image, caption, tuple(answers), text, tuple(groups) or ((caption,),)))
    return result, lost


def _group(sentence: str, record: Record) -> list[str]:
    """The sentence as it stands here, then the wordings of its normalised form."""
    others = list(record.value) if record.usable else []
    return [sentence, *(other for other in others if normalised(other) != normalised(sentence))]
