"""The dialogues of the small model: short questions for what it sees, rules (and labelled so) for what is language alone.

Merging, splitting and rewording are done by rules over the synthetic world's words; with an instruction-tuned model they
are the model's (generation/dialogues.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from reid_dist.data.synthetic.identity import ATTRIBUTES
from reid_dist.data.synthetic.words import SLOTS, read_phrases, slot_attributes
from reid_dist.generation import parsing
from reid_dist.generation.dialogues import accepted, whole_words
from reid_dist.generation.messages import Ask, BadInput, Outcome, Reply, Request, Sampling
from reid_dist.generation.prompts import PARAPHRASES, Family
from reid_dist.generation.tiny.questions import (
    attribute_question,
    ground_question,
    match_question,
    merged,
    pieces,
    read_attribute,
    rewordings,
    sentence,
    words_of,
)


@dataclass(frozen=True)
class TinyDialogues:
    """What the small model can be asked. Every answer is one word (or four numbers), so being cut off is no sign."""

    prompts: Family
    count: int = PARAPHRASES

    @property
    def family(self) -> str:
        return self.prompts.name

    @property
    def versions(self) -> dict[str, str]:
        found = {"describe": self.prompts.describe, "locate": self.prompts.locate, "ground": self.prompts.ground}
        return {
            **{name: prompt.version for name, prompt in found.items()},
            "search": f"{self.prompts.locate.version}+rounds",
            "merge": "rule-merge/v1", "split": "rule-split/v1", "paraphrase": f"rule-paraphrase/v1+{self.count}",
        }  # fmt: skip

    @property
    def rules(self) -> frozenset[str]:
        """Stages that need no model."""
        return frozenset({"merge", "split", "paraphrase"})

    def calls(self, stage: str) -> int:
        """One per attribute for a description."""
        return len(ATTRIBUTES) if stage == "describe" else 1

    def tokens(self, stage: str) -> tuple[int, int]:
        """Of one short question."""
        return {"ground": (6, 4), "locate": (30, 1)}.get(stage, (5, 1))

    async def describe(self, ask: Ask, image: bytes) -> Outcome:
        """Value: one sentence per slot of the figure, "" where nothing of it can be seen. One call per attribute."""
        asked = await asyncio.gather(*(self._attribute(ask, image, name) for name in ATTRIBUTES))
        replies = [reply for _, _, said in asked for reply in said]
        lost = [name for name, (word, _, _) in zip(ATTRIBUTES, asked, strict=True) if word is None]
        seen = {
            name: value
            for name, (word, _, _) in zip(ATTRIBUTES, asked, strict=True)
            if word is not None and (value := read_attribute(name, word)) is not None
        }
        sentences = [sentence(slot, {n: seen[n] for n in slot_attributes(slot) if n in seen}) for slot in SLOTS]
        if lost:
            return Outcome(sentences, "partial", f"malformed: no word for {', '.join(lost)}", tuple(replies))
        return Outcome(sentences, replies=tuple(replies))

    async def _attribute(self, ask: Ask, image: bytes, name: str) -> tuple[str | None, str, list[Reply]]:
        words = set(words_of(name).values())
        request = Request(attribute_question(name), Sampling(self.prompts.describe.max_tokens), image)
        return await accepted(whole_words(ask), request, lambda text: text.strip() if text.strip() in words else None)

    async def locate(self, ask: Ask, image: bytes, text: str) -> Outcome:
        """Value: whether the picture shows the person. A text that states nothing this world knows is a bad input."""
        question = match_question(read_phrases(text))
        if not question:
            raise BadInput(f"the description states nothing that the small model knows: {text[:80]!r}")
        request = Request(question, Sampling(self.prompts.locate.max_tokens), image)
        value, reason, replies = await accepted(whole_words(ask), request, parsing.yes_no)
        if value is None:
            return Outcome(False, "fallback", reason, tuple(replies))
        return Outcome(value, replies=tuple(replies))

    async def ground(self, ask: Ask, image: bytes, part: str, size: tuple[int, int]) -> Outcome:
        """Value: boxes of a part in fractions of the image (one at most)."""
        request = Request(ground_question(part), Sampling(self.prompts.ground.max_tokens), image)
        value, reason, replies = await accepted(
            whole_words(ask), request, lambda text: parsing.parse_boxes(text, self.prompts.boxes, size) or None
        )
        if value is None:
            return Outcome([], "fallback", reason, tuple(replies))
        return Outcome([list(box) for box in value], replies=tuple(replies))

    async def merge(self, ask: Ask, caption: str, answers: Sequence[str], max_words: int) -> Outcome:
        """Value: the caption and what was observed besides, by rule."""
        return Outcome(merged(caption, read_phrases(" ".join(answers))))

    async def split(self, ask: Ask, text: str) -> Outcome:
        """Value: one sentence per slot, by rule; a text without any is cut at sentence ends."""
        return Outcome(pieces(text) or parsing.sentences(text))

    async def paraphrase(self, ask: Ask, sentence: str) -> Outcome:
        """Value: the sentence first, then other wordings, by rule."""
        return Outcome(parsing.unique([sentence, *rewordings(sentence, self.count)]))
