"""Prompts, our own wording, each with a version: answers made with one version are never mixed with another's.

`locate`, `describe`, `merge`, `split`, `paraphrase` follow methods/icl.md section 7.1 (the authors' wording is not
published); `ground` asks for boxes of body parts (methods/muva.md section 5.4). Values are inserted as JSON strings, so
quotes and line breaks of a caption cannot end an instruction. Text-only prompts put the fixed instruction first, where the
engine's prefix cache finds it.

A family fits the model that serves it: "qwen" for instruction-tuned Qwen-VL models, "tiny" for the project's own small
model (generation/tiny), which knows a few short questions only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reid_dist.errors import UserError

TOPICS = (
    "gender",
    "hair style",
    "hair length",
    "hair colour",
    "upper-body clothing: colour, type and sleeves",
    "lower-body clothing: colour, type and leg length",
    "patterns on the clothes",
    "shoes",
    "glasses",
    "scarf",
    "object in the hands",
    "backpack or bag",
    "hat",
    "belt",
    "activity, background and other people",
)
PARAPHRASES = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """One instruction. `max_tokens` bounds the answer; `schema` and `choice` constrain its decoding."""

    version: str
    template: str  # with {name} for inserted values
    max_tokens: int
    schema: Mapping[str, Any] | None = None
    choice: tuple[str, ...] = ()

    def render(self, **values: Any) -> str:
        """The text, with every value as JSON. Raises KeyError for a value that is missing."""
        said = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
        text = self.template
        for name in values:
            if f"{{{name}}}" not in text:
                raise KeyError(f"prompt {self.version} has no place for {name!r}")
        # one pass over the template: a value that contains "{text}" is not itself filled in
        parts = text.split("{")
        out = [parts[0]]
        for part in parts[1:]:
            name, _, rest = part.partition("}")
            out += [said[name], rest]
        return "".join(out)


def array_schema(least: int, most: int) -> dict[str, Any]:
    """JSON schema of a list of `least` to `most` non-empty strings."""
    return {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": least, "maxItems": most}


LOCATE = Prompt(
    "locate/v1",
    "Below is a description of one pedestrian. Compare it with the picture, detail by detail. Description: {text}. "
    "Does the picture show this pedestrian? Answer with the single word Yes or No.",
    4,
    choice=("Yes", "No"),
)
DESCRIBE = Prompt(
    "describe/v1",
    "Look at the main pedestrian in the picture only. Write fifteen lines numbered 1. to 15., one short full sentence per "
    "line, on these topics in order: {topics}. State colours and types where you can see them. If a topic cannot be seen, "
    "write the number and 'not visible'. Do not use colons.",
    512,
)
MERGE = Prompt(
    "merge/v1",
    "The first entry is what a witness said, the others are observations of the same pedestrian. Write one fluent "
    "description of at most {max_words} words containing every fact once. If an observation contradicts the witness, keep "
    "the witness. Leave out topics reported as not visible. Return the description only. Entries: {entries}",
    256,
)
SPLIT = Prompt(
    "split/v1",
    "Break the pedestrian description below into sentences that each carry one attribute and can be read alone. Add "
    "nothing. Return a JSON array of strings. Description: {text}",
    512,
    schema=array_schema(2, 20),
)
PARAPHRASE = Prompt(
    "paraphrase/v1",
    "Give {count} different wordings of the sentence below with exactly the same meaning. Return a JSON array of {count} "
    "strings. Sentence: {sentence}",
    400,
    schema=array_schema(1, 20),
)
GROUND = Prompt(
    "ground/v1",
    "Find the {part} of the main pedestrian in the picture and give its bounding box.",
    96,
)
PART_WORDS = {"head": "head with hair and hat", "upper": "upper body with arms", "legs": "legs with feet"}

TINY_LOCATE = Prompt("tiny-locate/v2", "does this person match {text} ?", 1)
TINY_DESCRIBE = Prompt("tiny-describe/v2", "{attribute}:", 1)
TINY_GROUND = Prompt("tiny-ground/v1", "where is {part} ?", 4)


@dataclass(frozen=True, slots=True)
class Family:
    """The prompts of one kind of model, and the format of its boxes (parsing.BOX_FORMATS)."""

    name: str
    locate: Prompt
    describe: Prompt
    ground: Prompt
    boxes: str
    merge: Prompt | None = None  # None: merge, split and paraphrase are rules, and say so
    split: Prompt | None = None
    paraphrase: Prompt | None = None


_TEXT = {"merge": MERGE, "split": SPLIT, "paraphrase": PARAPHRASE}
FAMILIES: Mapping[str, Family] = {
    "qwen2-vl": Family("qwen2-vl", LOCATE, DESCRIBE, GROUND, "qwen2", **_TEXT),
    "qwen2.5-vl": Family("qwen2.5-vl", LOCATE, DESCRIBE, GROUND, "pixels", **_TEXT),
    "qwen3-vl": Family("qwen3-vl", LOCATE, DESCRIBE, GROUND, "thousandths", **_TEXT),
    "tiny": Family("tiny", TINY_LOCATE, TINY_DESCRIBE, TINY_GROUND, "tiny"),
}


def family(name: str) -> Family:
    """A family by name. Raises UserError."""
    if name not in FAMILIES:
        raise UserError(f"prompts={name}: choose {', '.join(FAMILIES)}")
    return FAMILIES[name]
