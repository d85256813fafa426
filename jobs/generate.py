"""Questions to a multimodal model about the pictures of packed tables; answers become a side table. See USAGE.

Every answer is kept in a ledger under what it was given for, so the same line run again asks nothing, and a job that was
killed asks only for what was not published (reid_dist/generation/ledger.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

from jobs._generation import (
    ModelOptions,
    make_job,
    prepare,
    refuse_other_source,
    store_rates,
    unique_images,
)
from jobs._generation_plan import plan
from jobs._job import record_in, refuse_unknown_flags, run_job, split_words
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.generate rda|masks|describe TABLE [TABLE ...] root=URI [key=value ...] [--plan]
  rda            captions enriched: groups of interchangeable sentences per caption -> side table TABLE-groups
  masks          boxes of head, upper body and legs -> part masks, side table TABLE-masks
  describe       answers about every picture -> side table TABLE-answers
  name=          of the side table; split=train (default) or another split, all for every picture
  model=small    the built-in small model; or a folder, an s3:// prefix, OWNER/NAME of the hub; revision=, adapter=FOLDER
  engines=N      most engines (engines_min=1 at the start); tensor_parallel=, parallel=, dtype=, context=, pixels=
  max_words=60   of a merged caption (130 for 168-token models); grid=[16,8] of masks
  replies=FILE   masks from a grounding model's replies made elsewhere, one {"path", "part", "reply"} a line (JSON); boxes=cogvlm
                 (default), qwen2, pixels or thousandths
  rate=          calls per second and engine for --plan; otherwise what an earlier job of this ledger measured
  retry_errors=true   ask again about rows that ended in an error
  --plan         count pictures, calls and tokens, estimate engine and GPU hours; nothing is started"""

Shown = dict[str, dict[str, Any]]  # per image digest what the page shows: Sample's "lists" and "drawn"
Written = tuple[dict[str, Any], Shown]  # facts for the record, and the page
STAGES = {"rda": ("describe", "merge", "split", "paraphrase"), "masks": ("ground",), "describe": ("describe",)}
MEANS = {"rda": "Enriched captions", "masks": "Part masks", "describe": "Descriptions"}
SUFFIX = {"rda": "groups", "masks": "masks", "describe": "answers"}
SHOWN = 8  # pictures on the page


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """What `jobs.generate` takes."""

    name: str = ""
    split: str = "train"
    max_words: int = 60
    grid: tuple[int, int] = (16, 8)
    rate: float = 0.0
    limit: int = 0  # first so many pictures only
    replies: str = ""  # file of a grounding model's replies, instead of asking one
    boxes: str = "cogvlm"  # how boxes stand in it


def main(argv: list[str]) -> dict[str, Any]:
    from jobs._words import split_options

    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan"}, USAGE)
    if len(words) < 2 or words[0] not in STAGES:
        raise UserError(f"expected rda, masks or describe, and a table. {USAGE.splitlines()[0]}")
    options, _ = split_options(GenerateOptions, values, rest_allowed=False)
    return generate(words[0], tuple(words[1:]), options, "--plan" in flags)


def generate(kind: str, tables: tuple[str, ...], options: GenerateOptions, plan_only: bool = False) -> dict[str, Any]:
    """The job; returns the record. Raises UserError, RunError."""
    import numpy as np

    from jobs._cluster import connect
    from reid_dist.data.store import open_view
    from reid_dist.storage import open_store

    splits = () if options.split == "all" else (options.split,)
    view = open_view(options.data, tables, splits)
    if options.limit:
        view = view.select(np.arange(min(options.limit, len(view))))
    if not len(view):
        raise UserError(f"{', '.join(tables)}: there are no pictures in split {options.split}")
    captions = sum(len(texts) for texts in view.captions)
    if kind == "rda" and not captions:
        raise UserError(f"{', '.join(tables)}: there are no captions to enrich in split {options.split}")
    name = options.name or f"{'+'.join(tables)}-{SUFFIX[kind]}"
    if options.replies:
        if kind != "masks" or plan_only:
            raise UserError(f"replies={options.replies}: read for masks only, and there is nothing to plan")
        return masks_of_file(view, options, name)
    answering = prepare(options, tables)
    source = answering.source(STAGES[kind])
    refuse_other_source(options.root, name, source)
    job_of = functools.partial(make_job, answering, tables, splits, view)
    if plan_only:
        stages = plan(STAGES[kind], job_of(take=False), view, answering, options.rate)
        return {"name": name, "ledger": answering.ledger, "source": source, "plan": stages}
    ledger = open_store(answering.ledger)
    record_in(lambda record: ledger.write(f"records/{name}.json", json.dumps(record, default=str, indent=1).encode()))
    started = time.monotonic()
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    with contextlib.ExitStack() as ray_for_the_job:
        # Only a job that has something to ask starts, or connects to, Ray.
        job = job_of(lambda: ray_for_the_job.enter_context(connect(math.ceil(options.engines) + 1)))
        publish = {"rda": publish_groups, "masks": publish_masks, "describe": publish_answers}[kind]
        written, shown = publish(job, view, options, name, source)
    store_rates(answering.ledger, job.summaries)
    page = write_page(kind, job, view, name, source, shown)
    return {
        "kind": kind, "name": name, "source": source, "ledger": answering.ledger, **written,
        "calls": sum(done["calls"] for done in job.summaries.values()), "seconds": round(time.monotonic() - started, 1),
        "stages": job.summaries, "report": page,
    }  # fmt: skip


def publish_groups(job: Any, view: Any, options: GenerateOptions, name: str, source: str) -> Written:
    """Enriched captions as a side table."""
    from reid_dist.data.captions import CaptionGroups, caption_digest, write_caption_groups
    from reid_dist.generation.stages import enrich

    captions: dict[str, tuple[int, list[str]]] = {}
    for image, row in unique_images(view).items():
        captions[image] = (row, [])
    for row, image in enumerate(view.digests(range(len(view)))):
        captions[image][1].extend(view.captions[row])
    found, lost = enrich(job, [(image, row, texts) for image, (row, texts) in captions.items()], options.max_words)
    if not found:
        raise UserError(f"{name}: no picture could be asked about ({len(lost)} error rows in the ledger)")
    rows = [CaptionGroups(one.image, caption_digest(one.caption), one.groups) for one in found]
    version = write_caption_groups(options.root, name, rows, source)
    sentences = sum(len(one.groups) for one in found)
    shown: Shown = {}
    for one in found:
        lists = shown.setdefault(one.image, {"lists": {"Answers": list(one.answers)}})["lists"]
        lists.setdefault("Merged captions", []).append(one.merged)
        lists.setdefault("Groups of the first caption", [list(group) for group in one.groups])
    facts = {
        "version": version, "captions": len(found), "error_rows": len(lost),
        "sentences_per_caption": round(sentences / len(found), 2),
        "unique_sentences": job.summaries["paraphrase"]["known"] + job.summaries["paraphrase"]["units"],
    }  # fmt: skip
    return facts, shown


def publish_masks(job: Any, view: Any, options: GenerateOptions, name: str, source: str) -> Written:
    """Boxes rasterised to part masks as a side table."""
    from jobs._boxes import write_boxes

    grounded = job.ground(unique_images(view))
    usable = {i: parts for i, parts in grounded.items() if all(record.usable for record in parts.values())}
    boxes = {image: {part: record.value for part, record in parts.items()} for image, parts in usable.items()}
    facts, shown = write_boxes(boxes, options.root, name, options.grid, source)
    return facts | {"error_rows": len(grounded) - len(usable)}, shown


def _said(answers: list[str | None]) -> list[str]:
    return [answer for answer in answers if answer]


def publish_answers(job: Any, view: Any, options: GenerateOptions, name: str, source: str) -> Written:
    """Answers per picture as a side table: image, answers (list of text, null: no answer), status."""
    import pyarrow as pa

    from reid_dist.data.side import write_side_table

    described = job.describe(unique_images(view))
    usable = {image: record for image, record in described.items() if record.usable}
    if not usable:
        raise UserError(f"{name}: no picture could be asked about ({len(described)} error rows in the ledger)")
    table = pa.table(
        {
            "image": pa.array(list(usable), pa.string()),
            "answers": pa.array([record.value for record in usable.values()], pa.list_(pa.string())),
            "status": pa.array([record.status for record in usable.values()], pa.string()),
        }
    )
    version = write_side_table(options.root, name, table, ["image"], {"kind": "answers", "source": source})
    shown = {image: {"lists": {"Answers": _said(record.value)}} for image, record in usable.items()}
    return {"version": version, "images": len(usable), "error_rows": len(described) - len(usable)}, shown


def masks_of_file(view: Any, options: GenerateOptions, name: str) -> dict[str, Any]:
    """Masks from replies that were made elsewhere; returns the record. Raises UserError."""
    from jobs._boxes import boxes_of_replies, write_boxes
    from reid_dist.storage import open_store

    folder, _, file = options.replies.rpartition("/")
    try:
        content = open_store(folder or ".").read(file)
    except FileNotFoundError:
        raise UserError(f"replies={options.replies}: there is no such file") from None
    source = f"replies {file} {hashlib.sha256(content).hexdigest()[:12]} read as {options.boxes}"
    refuse_other_source(options.root, name, source)
    boxes, unread = boxes_of_replies(content, options.replies, options.boxes, view)
    facts, _ = write_boxes(boxes, options.root, name, options.grid, source)
    return {"kind": "masks", "name": name, "source": source, **facts, "replies_without_a_box": unread}


def write_page(kind: str, job: Any, view: Any, name: str, source: str, shown: Shown) -> str:
    """The job's page below its ledger; returns its place."""
    import shlex
    import sys

    import numpy as np

    from reid_dist.reporting.generation import Reject, Sample, render_generation

    rows = unique_images(view)
    some = [image for image in rows if image in shown]
    picked = [some[i] for i in np.unique(np.linspace(0, len(some) - 1, min(SHOWN, len(some))).astype(int))]
    samples = []
    for image in picked:
        row = rows[image]
        lists = {"Original captions": list(view.captions[row])} | shown[image]["lists"]
        samples.append(Sample(view.encoded([row])[0], view.path(row), lists, shown[image].get("drawn", {})))
    rejects = []
    for stage, record in job.rejects():
        said = record.facts["replies"][-1]["text"][:120] if record.facts["replies"] else ""
        rejects.append(Reject(stage, record.status, record.reason, said, record.key))
    page = render_generation(
        f"Generated: {name}", f"{MEANS[kind]} of {len(rows)} pictures of {view.describe()}.", samples, rejects, job.summaries,
        {"answers": source, "ledger": job.ledger.store.uri, **{t: str(v) for t, v in view.versions.items()}},
        shlex.join(["python", "-m", "jobs.generate", *sys.argv[1:]]),
        any("synthetic" in table.facts.notes for table in view.tables),
    )  # fmt: skip
    job.ledger.store.write(f"pages/{name}.html", page.encode())
    return f"{job.ledger.store.uri}/pages/{name}.html"


if __name__ == "__main__":
    run_job("generate", main)
