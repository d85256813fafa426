"""Strict readers of model answers: what is not in the agreed form is None, and the dialogue retries or falls back.

`legacy_answers` is the released code's own reader, kept for parity (goldens parse_vqa_answers; it drops second sentences
and every line with a colon, methods/icl.md section 6).
"""

from __future__ import annotations

import json
import re
from typing import Any

NOT_VISIBLE = "not visible"
_NUMBERED = re.compile(r"^\s*(\d{1,2})\s*[.)]\s*(.*\S)?\s*$")
_LIST_MARK = re.compile(r"^\s*(?:\d{1,2}\s*[.)]\s|[-*\u2022]\s|```|\[|\{)", re.MULTILINE)
_REFUSAL = re.compile(
    r"^\W*(?:(?:i'?m|i am) (?:really |very |so )?(?:sorry|unable|not able)|sorry\b|(?:i )?apologi[sz]e|as an ai\b|"
    r"i (?:can(?:'?t|not)|won'?t|will not|do not|don'?t) |unfortunately,? i )",
    re.IGNORECASE,
)
_UNSEEN = re.compile(r"^\W*(?:not (?:visible|seen|clear)|cannot be seen|unknown|n/?a)\W*$", re.IGNORECASE)
_FENCE = re.compile(r"^```(?:json)?\s*\n(.*?)\n?```$", re.DOTALL)


def legacy_answers(response: str) -> list[str]:
    """One sentence per line without a colon, as the released code reads them; empty ones stay."""
    answers = []
    for line in response.split("\n"):
        if ":" in line:
            continue
        pieces = line.split(". ")
        text = pieces[1] if len(pieces) > 1 else None
        if text is None:
            answers.append("")
            continue
        text = text.replace("Yes, ", "").replace("No, ", "")
        text = text[:1].upper() + text[1:]
        answers.append(text if text.endswith(".") else f"{text}.")
    return answers


def is_refusal(text: str) -> bool:
    """Whether an answer begins as refusals do."""
    return bool(_REFUSAL.match(text.replace("\u2019", "'")))


def yes_no(text: str) -> bool | None:
    """The first word, if it is yes or no."""
    words = re.findall(r"[a-z]+", text.lower())
    return {"yes": True, "no": False}.get(words[0]) if words else None


def numbered_answers(text: str, count: int) -> list[str | None]:
    """`count` answers: a sentence, "" for a topic that is not visible, None for a number that is missing or doubled."""
    found: dict[int, list[str]] = {}
    for line in text.splitlines():
        match = _NUMBERED.match(line)
        if match and 1 <= int(match[1]) <= count:
            found.setdefault(int(match[1]), []).append(match[2] or "")
    answers: list[str | None] = []
    for number in range(1, count + 1):
        said = found.get(number, [])
        answers.append(_sentence(said[0]) if len(said) == 1 and said[0] else None)
    return answers


def _sentence(text: str) -> str | None:
    if _UNSEEN.match(text):
        return ""
    if is_refusal(text):
        return None
    text = re.sub(r"^(?:yes|no),\s+", "", text.strip(), flags=re.IGNORECASE)
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def prose(text: str, most_words: int) -> str | None:
    """One description of 5 to `most_words` words without list marks; None when it is none."""
    joined = " ".join(text.split())
    words = len(joined.split())
    if not 5 <= words <= most_words or _LIST_MARK.search(text) or is_refusal(text):
        return None
    return joined


def string_array(text: str) -> list[str] | None:
    """A JSON array of non-empty strings, doubles removed (case and final stop ignored); a code fence around it is
    allowed.
    """
    stripped = text.strip()
    fenced = _FENCE.match(stripped)
    try:
        items = json.loads(fenced[1] if fenced else stripped)
    except ValueError:
        return None
    if not isinstance(items, list) or not items:
        return None
    if not all(isinstance(item, str) and item.strip() for item in items):
        return None
    return unique([" ".join(item.split()) for item in items])


def unique(sentences: list[str]) -> list[str]:
    """Without later wordings that equal an earlier one but for case, spaces and the final stop."""
    seen: dict[str, str] = {}
    for sentence in sentences:
        seen.setdefault(normalised(sentence), sentence)
    return list(seen.values())


def normalised(sentence: str) -> str:
    """The form under which sentences count as the same."""
    return " ".join(sentence.lower().split()).rstrip(" .")


def sentences(text: str) -> list[str]:
    """Rule-based split at sentence ends: the fallback of `split`."""
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'])", " ".join(text.split()))
    return [part for part in parts if part]


# ---- boxes: (left, top, right, bottom) in fractions of the image

Box = tuple[float, float, float, float]
TINY_BINS = 32  # coordinates of the small model's boxes
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_PAIRS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)")
_DOUBLE = re.compile(r"\[\[([\d\s,;]+)\]\]")
BOX_FORMATS = ("qwen2", "pixels", "thousandths", "cogvlm", "tiny")


def parse_boxes(text: str, form: str, size: tuple[int, int] | None = None) -> list[Box]:
    """All well-formed boxes of an answer, in fractions; an empty list when there is none.

    form: "qwen2" (pairs in thousandths), "pixels" (JSON bbox_2d in pixels of the image as the model saw it, whose
    (height, width) is `size`), "thousandths" (JSON bbox_2d in thousandths), "cogvlm" ([[x0,y0,x1,y1;...]] in
    thousandths), "tiny" (four bins of 32). Raises ValueError for another form, or "pixels" without a size.
    """
    if form not in BOX_FORMATS:
        raise ValueError(f"box format {form!r}: known are {', '.join(BOX_FORMATS)}")
    if form == "pixels" and size is None:
        raise ValueError("boxes in pixels need the size (height, width) of the image as the model saw it")
    scale = (1000.0, 1000.0)
    if form == "qwen2":
        found = [[float(number) for number in match] for match in _PAIRS.findall(text)]
    elif form == "cogvlm":
        found = [_numbers(box) for group in _DOUBLE.findall(text) for box in group.split(";")]
    elif form == "tiny":
        scale = (float(TINY_BINS), float(TINY_BINS))
        found = [_numbers(text)]
    else:
        found = _json_boxes(text)
        if form == "pixels" and size is not None:
            scale = (float(size[1]), float(size[0]))
    boxes = [(b[0] / scale[0], b[1] / scale[1], b[2] / scale[0], b[3] / scale[1]) for b in found if len(b) == 4]
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3] and min(box) >= 0 and max(box) <= 1.01]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+", text)]


def _json_boxes(text: str) -> list[list[float]]:
    stripped = text.strip()
    fenced = _FENCE.match(stripped)
    try:
        items: Any = json.loads(fenced[1] if fenced else stripped)
    except ValueError:
        return []
    items = items if isinstance(items, list) else [items]
    boxes = [item.get("bbox_2d") for item in items if isinstance(item, dict)]
    return [
        [float(value) for value in box]
        for box in boxes
        if isinstance(box, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    ]
