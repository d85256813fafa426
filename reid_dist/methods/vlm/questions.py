"""What the model is asked while it is tuned, and what it should answer.

A file of questions has one JSON object per line: {"image": hex SHA-256 of the encoded picture, "question": text, "answer":
text, "split": "train" | "val"}. `jobs.finetune_vlm` writes it, with hard negatives (generation/pairs.py). Without a file,
every caption is asked about its own picture and about a picture of somebody else, drawn at random.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from reid_dist.data.captions import caption_pairs
from reid_dist.data.draws import plan_rng
from reid_dist.errors import UserError
from reid_dist.methods.vlm.config import Config

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

SPLITS = ("train", "val")


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one picture (a row of a view)."""

    row: int
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file of questions."""

    image: str
    question: str
    answer: str
    split: str


def write_lines(lines: Sequence[Line]) -> str:
    """The file's content."""
    return "".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines)


def read_lines(text: str, where: str) -> list[Line]:
    """Inverse of `write_lines`. Raises UserError naming the line."""
    found = []
    for number, content in enumerate(text.splitlines(), start=1):
        try:
            line = Line(**json.loads(content))
        except (ValueError, TypeError):
            raise UserError(f"{where} line {number}: expected image, question, answer and split as JSON") from None
        if line.split not in SPLITS:
            raise UserError(f"{where} line {number}: split {line.split!r}; known: {', '.join(SPLITS)}")
        found.append(line)
    return found


def questions_of(config: Config, view: TableView, split: str, seed: int) -> list[Question]:
    """The questions of a split about the pictures of `view`. Raises UserError."""
    if not config.pairs:
        return plain_questions(config, view, seed)
    from reid_dist.storage import cached_file

    with open(cached_file(config.pairs), encoding="utf-8") as file:
        lines = [line for line in read_lines(file.read(), config.pairs) if line.split == split]
    rows = {image: row for row, image in reversed(list(enumerate(view.digests(np.arange(len(view))))))}
    lost = [line.image for line in lines if line.image not in rows]
    if lost:
        raise UserError(
            f"{config.pairs}: {len(lost)} of {len(lines)} {split} questions are about pictures that the tables do not "
            f"hold (first: {lost[0][:12]}): name the tables and splits that it was made from"
        )
    foreign = sorted({line.answer for line in lines} - set(config.answers))
    if foreign:
        raise UserError(f"{config.pairs}: answer {foreign[0]!r} is none of model.answers={list(config.answers)}")
    return [Question(rows[line.image], line.question, line.answer) for line in lines]


def plain_questions(config: Config, view: TableView, seed: int) -> list[Question]:
    """Two questions per caption: its own picture, and one of another person. Draws follow from (seed, caption)."""
    pids, found = np.asarray(view.pid), []
    if len(np.unique(pids)) < 2:
        return []
    for place, (row, part) in enumerate(caption_pairs(view).tolist()):
        text = config.question.replace("{text}", view.captions[row][part])
        others = np.flatnonzero(pids != pids[row])
        other = int(others[plan_rng(seed, place, "somebody else").integers(len(others))])
        found += [Question(row, text, config.answers[0]), Question(other, text, config.answers[1])]
    return found
