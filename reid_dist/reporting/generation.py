"""The page of a generation job: sample pictures with what was asked and answered, rejects, throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from reid_dist.reporting.figures import data_uri
from reid_dist.reporting.page import ReportInput, Section, render_sections
from reid_dist.reporting.tables import table

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in fractions of the picture
STAGES = (
    "Known: found in the ledger. New: worked on now. At work: from the first request to the last answer, the start of engines "
    "left out; the rates are over that time."
)
COLOURS = 6  # of the page (--c0 to --c5)


@dataclass(frozen=True)
class Sample:
    """One picture. `lists`: {heading: lines}, for example captions, answers; a line of several texts is a group, its first
    text before the others. All texts are escaped. `drawn`: {label: {part: rectangles}}, each the picture once more with the
    rectangles of its parts on it.
    """

    image: bytes
    label: str
    lists: Mapping[str, Sequence[str | Sequence[str]]]
    drawn: Mapping[str, Mapping[str, Sequence[Rectangle]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """One answer that was not accepted."""

    stage: str
    status: str
    reason: str
    said: str  # the last reply, shortened
    key: str


def render_generation(
    title: str,
    summary: str,
    samples: Sequence[Sample],
    rejects: Sequence[Reject],
    stages: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, str],
    command: str,
    synthetic: bool,
) -> str:
    """The page as HTML text. `stages`: what each stage did (generation/shards.Progress.summary).

    Raises ValueError for a sample picture that cannot be read.
    """
    sections = [
        Section("Throughput and outcome", [_stages(stages)], STAGES),
        Section(
            "Samples",
            [Markup("").join(_sample(sample) for sample in samples)],
            "Pictures spread evenly over the table.",
        ),
        Section("Rejects", [_rejects(rejects)] if rejects else ["Every answer was accepted."]),
    ]
    return render_sections(
        ReportInput(
            title=title, summary=summary, metrics={}, synthetic=synthetic, command=command, recipe="",
            provenance=provenance, sections=sections,
        )
    )  # fmt: skip


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> Markup:
    rows = []
    for name, done in stages.items():
        working = float(done["working_seconds"])
        rates = [f"{done[name] / working:.1f}" if done[name] and working else "" for name in ("units", "calls")]
        outcome = ", ".join(f"{count} {status}" for status, count in done["statuses"].items())
        tokens = f"{done['prompt_tokens']} / {done['completion_tokens']}"
        times = [f"{done['seconds']:.1f}", f"{working:.1f}"] if done["units"] else ["", ""]
        rows.append([name, done["known"], done["units"], done["calls"], tokens, *times, *rates, outcome])
    header = ["Stage", "Known", "New", "Calls", "Tokens in / out", "Seconds", "at work", "Rows/s", "Calls/s", "Outcome"]
    return table(header, rows)


def _sample(sample: Sample) -> Markup:
    lists = Markup("").join(
        Markup("<div{}><b>{}</b><ul>{}</ul></div>").format(
            Markup("") if isinstance(lines[0], str) else Markup(" class=groups"),
            heading,
            Markup("").join(Markup("<li>{}</li>").format(_line(line)) for line in lines),
        )
        for heading, lines in sample.lists.items()
        if lines
    )
    pictures = [_picture(sample.image, sample.label, Markup(""))]
    pictures += [_picture(sample.image, label, _rectangles(parts)) for label, parts in sample.drawn.items()]
    return Markup("<div class=sample><div class=pictures>{}</div><div class=told>{}</div></div>").format(
        Markup("").join(pictures), lists
    )


def _line(line: str | Sequence[str]) -> Markup:
    if isinstance(line, str):
        return escape(line)
    return Markup("{} <span class=muted>{}</span>").format(line[0], " | ".join(line[1:]))


def _picture(image: bytes, label: str, over: Markup) -> Markup:
    return Markup(
        "<figure><div class=under><img src='{}' alt='{}'>{}</div><figcaption>{}</figcaption></figure>"
    ).format(data_uri(image), label, over, label)


def _rectangles(parts: Mapping[str, Sequence[Rectangle]]) -> Markup:
    """An SVG over the whole picture; every part in a colour of its own, named when pointed at."""
    drawn = [
        Markup("<rect class=c{} x={:.4f} y={:.4f} width={:.4f} height={:.4f}><title>{}</title></rect>").format(
            number % COLOURS, box[0], box[1], box[2] - box[0], box[3] - box[1], part
        )
        for number, (part, boxes) in enumerate(parts.items())
        for box in boxes
    ]
    return Markup("<svg viewBox='0 0 1 1' preserveAspectRatio=none>{}</svg>").format(Markup("").join(drawn))


def _rejects(rejects: Sequence[Reject]) -> Markup:
    rows = [[one.stage, one.status, one.reason, one.said, one.key[:12]] for one in rejects]
    return table(["Stage", "Taken as", "Why", "Last reply", "Key"], rows)
