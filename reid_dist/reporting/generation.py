"""The page of a generation job: sample pictures with what was asked and answered, rejects, throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from reid_dist.reporting.figures import data_uri
from reid_dist.reporting.page import ReportInput, Section, render_sections
from reid_dist.reporting.tables import table


@dataclass(frozen=True)
class Sample:
    """One picture. `lists`: {heading: lines}, for example captions, answers, groups; texts are escaped."""

    image: bytes
    label: str
    lists: Mapping[str, Sequence[str]]


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
        Section("Throughput and outcome", [_stages(stages)]),
        Section("Samples", [_sample(sample) for sample in samples], "Pictures spread evenly over the table."),
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
        seconds = float(done["seconds"])
        rate = f"{done['units'] / seconds:.1f}" if done["units"] and seconds else ""
        outcome = ", ".join(f"{count} {status}" for status, count in done["statuses"].items())
        tokens = f"{done['prompt_tokens']} / {done['completion_tokens']}"
        rows.append([name, done["known"], done["units"], done["calls"], tokens, f"{seconds:.1f}", rate, outcome])
    header = ["Stage", "In the ledger", "Worked on", "Calls", "Tokens in / out", "Seconds", "Rows/s", "Outcome"]
    return table(header, rows)


def _sample(sample: Sample) -> Markup:
    lists = Markup("").join(
        Markup("<p>{}</p><ul>{}</ul>").format(
            heading, Markup("").join(Markup("<li>{}</li>").format(line) for line in lines)
        )
        for heading, lines in sample.lists.items()
        if lines
    )
    picture = Markup("<figure><img src='{}' alt='{}'><figcaption>{}</figcaption></figure>").format(
        data_uri(sample.image), sample.label, sample.label
    )
    return Markup("<div class=strip><div class=pictures>{}</div>{}</div>").format(picture, lists)


def _rejects(rejects: Sequence[Reject]) -> Markup:
    rows = [[one.stage, one.status, one.reason, one.said, one.key[:12]] for one in rejects]
    return table(["Stage", "Taken as", "Why", "Last reply", "Key"], rows)
