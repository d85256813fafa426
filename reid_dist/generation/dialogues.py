"""The stages of caption enrichment, and what interaction and grounding ask, as pure coroutines (methods/icl.md 7).

    describe  picture -> answers to fifteen topics        accept 8 answers, else retry twice, else what there is ("partial")
    merge     caption + answers -> one description        retry, else the caption
    split     description -> sentences of one attribute   retry, else cut at sentence ends
    paraphrase sentence -> other wordings                 retry, else the sentence alone
    locate    picture + description -> yes or no          retry, else no
    ground    picture + body part -> boxes                retry, else none

A retry draws with a seed of its own at temperature 0.3, because asking greedily again gives the same answer. Cut-off and
refused answers are never accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from reid_dist.generation import parsing
from reid_dist.generation.messages import Ask, Outcome, Reply, Request, Sampling
from reid_dist.generation.prompts import PARAPHRASES, PART_WORDS, TOPICS, Family, Prompt

RETRIES = 2
RETRY_TEMPERATURE = 0.3
LEAST_ANSWERS = 8  # of fifteen
Reader = Callable[[str], Any]  # text -> value, None when it is not acceptable


class Dialogues(Protocol):
    """What a family of models can be asked. Every method raises BadInput when a row cannot be asked about."""

    @property
    def family(self) -> str: ...
    @property
    def versions(self) -> dict[str, str]:
        """stage -> version of its prompt, or of the rule that stands in for a model."""
        ...

    @property
    def rules(self) -> frozenset[str]:
        """Stages that need no model."""
        ...

    def calls(self, stage: str) -> int:
        """Calls of one unit when nothing is asked again."""
        ...

    def tokens(self, stage: str) -> tuple[int, int]:
        """Estimate for one call: tokens of the prompt without picture, tokens of the answer."""
        ...

    async def describe(self, ask: Ask, image: bytes) -> Outcome: ...
    async def locate(self, ask: Ask, image: bytes, text: str) -> Outcome: ...
    async def ground(self, ask: Ask, image: bytes, part: str, size: tuple[int, int]) -> Outcome: ...
    async def merge(self, ask: Ask, caption: str, answers: Sequence[str], max_words: int) -> Outcome: ...
    async def split(self, ask: Ask, text: str) -> Outcome: ...
    async def paraphrase(self, ask: Ask, sentence: str) -> Outcome: ...


async def accepted(ask: Ask, request: Request, read: Reader, retries: int = RETRIES) -> tuple[Any, str, list[Reply]]:
    """(value or None, reason for None, all replies): ask, and ask again while the answer is not acceptable."""
    replies: list[Reply] = []
    reason = ""
    for attempt in range(retries + 1):
        if attempt:
            again = Sampling(request.sampling.max_tokens, RETRY_TEMPERATURE, attempt)
            request = dataclasses.replace(request, sampling=again)
        reply = await ask(request)
        replies.append(reply)
        reason = _rejected(reply)
        if not reason:
            value = read(reply.text)
            if value is not None:
                return value, "", replies
            reason = "malformed"
    return None, reason, replies


def _rejected(reply: Reply) -> str:
    if reply.finish == "abort":
        return "aborted"
    if reply.finish == "length":
        return "truncated"
    if not reply.text.strip():
        return "empty"
    return "refused" if parsing.is_refusal(reply.text) else ""


def observations(answers: Sequence[str | None]) -> list[str]:
    """The answers that say something about the picture."""
    return [answer for answer in answers if answer]


@dataclass(frozen=True)
class ModelDialogues:
    """Every stage asked of an instruction-tuned model.

    `answers` "legacy" reads descriptions as the released code does (no retry, empty sentences stay).
    """

    prompts: Family
    answers: Literal["strict", "legacy"] = "strict"
    count: int = PARAPHRASES

    @property
    def family(self) -> str:
        return self.prompts.name

    @property
    def versions(self) -> dict[str, str]:
        prompts = {
            name: self._prompt(name) for name in ("describe", "locate", "ground", "merge", "split", "paraphrase")
        }
        found = {name: prompt.version for name, prompt in prompts.items()}
        found["search"] = f"{found['locate']}+rounds"
        found["describe"] += "" if self.answers == "strict" else "+legacy"
        found["paraphrase"] += f"+{self.count}"
        return found

    @property
    def rules(self) -> frozenset[str]:
        return frozenset()

    def calls(self, stage: str) -> int:
        """One."""
        return 1

    def tokens(self, stage: str) -> tuple[int, int]:
        """From the length of the prompt (four signs a token, 80 tokens of inserted text) and half the room to answer."""
        prompt = self._prompt(stage)
        return len(prompt.template) // 4 + 80, max(1, prompt.max_tokens // 2)

    def _prompt(self, stage: str) -> Prompt:
        prompt = getattr(self.prompts, stage)
        if prompt is None:
            raise ValueError(f"the prompts of {self.prompts.name} have no {stage}")
        return prompt

    def _request(self, stage: str, image: bytes | None = None, **values: Any) -> Request:
        prompt = self._prompt(stage)
        sampling = Sampling(prompt.max_tokens)
        return Request(prompt.render(**values), sampling, image, prompt.schema, prompt.choice)

    async def describe(self, ask: Ask, image: bytes) -> Outcome:
        """Value: a list of fifteen, each a sentence, "" (not visible) or None (no answer). `legacy`: all lines read."""
        request = self._request("describe", image, topics=", ".join(TOPICS))
        if self.answers == "legacy":
            reply = await ask(request)
            return Outcome(parsing.legacy_answers(reply.text), replies=(reply,))
        best: list[str | None] = [None] * len(TOPICS)

        def read(text: str) -> list[str | None] | None:
            nonlocal best
            found = parsing.numbered_answers(text, len(TOPICS))
            if _answered(found) > _answered(best):
                best = found
            return found if _answered(found) >= LEAST_ANSWERS else None

        value, reason, replies = await accepted(ask, request, read)
        if value is None:
            return Outcome(best, "partial", f"{reason}: {_answered(best)} answers", tuple(replies))
        return Outcome(value, replies=tuple(replies))

    async def locate(self, ask: Ask, image: bytes, text: str) -> Outcome:
        """Value: whether the picture shows the person described."""
        request = self._request("locate", image, text=text)
        # One word needs no end mark: "Yes." cut after the stop is a whole answer.
        value, reason, replies = await accepted(whole_words(ask), request, parsing.yes_no)
        if value is None:
            return Outcome(False, "fallback", reason, tuple(replies))
        return Outcome(value, replies=tuple(replies))

    async def ground(self, ask: Ask, image: bytes, part: str, size: tuple[int, int]) -> Outcome:
        """Value: boxes of a part (head, upper, legs) in fractions of the image. `size`: (height, width) as the model
        sees it.
        """
        request = self._request("ground", image, part=PART_WORDS[part])
        value, reason, replies = await accepted(
            ask, request, lambda text: parsing.parse_boxes(text, self.prompts.boxes, size) or None
        )
        if value is None:
            return Outcome([], "fallback", reason, tuple(replies))
        return Outcome([list(box) for box in value], replies=tuple(replies))

    async def merge(self, ask: Ask, caption: str, answers: Sequence[str], max_words: int) -> Outcome:
        """Value: one text of at most twice `max_words` words; without answers the caption, unasked."""
        if not answers:
            return Outcome(caption)
        request = self._request("merge", entries=[caption, *answers], max_words=max_words)
        value, reason, replies = await accepted(ask, request, lambda text: parsing.prose(text, 2 * max_words))
        if value is None:
            return Outcome(caption, "fallback", reason, tuple(replies))
        return Outcome(value, replies=tuple(replies))

    async def split(self, ask: Ask, text: str) -> Outcome:
        """Value: 2 to 20 sentences of at least three words (the fallback may give one)."""

        def read(answer: str) -> list[str] | None:
            items = parsing.string_array(answer)
            good = items is not None and 2 <= len(items) <= 20 and all(len(item.split()) >= 3 for item in items)
            return items if good else None

        value, reason, replies = await accepted(ask, self._request("split", text=text), read)
        if value is None:
            return Outcome(parsing.sentences(text), "fallback", reason, tuple(replies))
        return Outcome(value, replies=tuple(replies))

    async def paraphrase(self, ask: Ask, sentence: str) -> Outcome:
        """Value: the sentence first, then up to `count` other wordings."""
        request = self._request("paraphrase", sentence=sentence, count=self.count)
        value, reason, replies = await accepted(ask, request, parsing.string_array)
        if value is None:
            return Outcome([sentence], "fallback", reason, tuple(replies))
        return Outcome(parsing.unique([sentence, *value])[: self.count + 1], replies=tuple(replies))


def _answered(answers: Sequence[str | None]) -> int:
    return sum(answer is not None for answer in answers)


def whole_words(ask: Ask) -> Ask:
    """`ask` for answers of a fixed number of words: stopped by the token limit is not cut off."""

    async def asked(request: Request) -> Reply:
        reply = await ask(request)
        return dataclasses.replace(reply, finish="stop") if reply.finish == "length" else reply

    return asked
