"""Questions to a multimodal model about the pictures of packed tables; answers become a side table. See USAGE.

Every answer is kept in a ledger under what it was given for, so the same line run again asks nothing, and a job that was
killed asks only for what was not published (reid_dist/generation/ledger.py).
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

from jobs._generation import (
    Answering,
    ModelOptions,
    make_job,
    measured_rate,
    prepare,
    refuse_other_source,
    store_rates,
    unique_images,
)
from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.generate rda|masks|describe TABLE [TABLE ...] root=URI [key=value ...] [--plan]
  rda            captions enriched: groups of interchangeable sentences per caption -> side table TABLE-rda
  masks          boxes of head, upper body and legs -> part masks, side table TABLE-masks
  describe       answers about every picture -> side table TABLE-answers
  name=          of the side table; split=train (default) or another split, all for every picture
  model=small    the built-in small model; or a folder, an s3:// prefix, OWNER/NAME of the hub; revision=, adapter=FOLDER
  engines=N      most engines (engines_min=1 at the start); tensor_parallel=, parallel=, dtype=, context=, pixels=
  max_words=60   of a merged caption (130 for 168-token models); grid=[16,8] of masks
  rate=          calls per second and engine for --plan, where nothing was measured yet
  retry_errors=true   ask again about rows that ended in an error
  --plan         count pictures, calls and tokens, estimate the time; nothing is started"""

logger = logging.getLogger("reid_dist.jobs.generate")
Written = tuple[dict[str, Any], dict[str, dict[str, list[str]]]]  # facts; per image digest what the page lists
STAGES = {"rda": ("describe", "merge", "split", "paraphrase"), "masks": ("ground",), "describe": ("describe",)}
SUFFIX = {"rda": "rda", "masks": "masks", "describe": "answers"}
SMALL_TOKENS = 8  # of a picture, as the small model sees it
SHOWN = 8  # pictures on the page
SENTENCES = 6  # of a merged caption, for estimates: unique sentences are far fewer in a corpus


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """What `jobs.generate` takes."""

    name: str = ""
    split: str = "train"
    max_words: int = 60
    grid: tuple[int, int] = (16, 8)
    rate: float = 0.0
    limit: int = 0  # first so many pictures only


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

    splits = () if options.split == "all" else (options.split,)
    view = open_view(options.data, tables, splits)
    if options.limit:
        view = view.select(np.arange(min(options.limit, len(view))))
    if not len(view):
        raise UserError(f"{', '.join(tables)}: there are no pictures in split {options.split}")
    captions = sum(len(texts) for texts in view.captions)
    if kind == "rda" and not captions:
        raise UserError(f"{', '.join(tables)}: there are no captions to enrich in split {options.split}")
    answering = prepare(options, tables)
    name = options.name or f"{'+'.join(tables)}-{SUFFIX[kind]}"
    source = answering.source(STAGES[kind])
    refuse_other_source(options.root, name, source)
    if plan_only:
        return {
            "plan": plan(kind, view, answering, options),
            "name": name,
            "ledger": answering.ledger,
            "source": source,
        }
    started = time.monotonic()
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    with connect(math.ceil(options.engines) + 1):
        job = make_job(answering, tables, splits, view)
        publish = {"rda": publish_groups, "masks": publish_masks, "describe": publish_answers}[kind]
        written, lists = publish(job, view, options, name, source)
    seconds = time.monotonic() - started
    store_rates(answering.ledger, job.summaries, options.engines)
    calls = sum(done["calls"] for done in job.summaries.values())
    page = write_page(kind, job, view, name, source, lists)
    return {
        "kind": kind, "name": name, "source": source, "ledger": answering.ledger, **written, "calls": calls,
        "calls_per_s": round(calls / seconds, 2), "seconds": round(seconds, 1), "stages": job.summaries,
        "report": page,
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
    lists: dict[str, dict[str, list[str]]] = {}
    for one in found:
        mine = lists.setdefault(one.image, {})
        mine[f"Caption: {one.caption}"] = [one.merged, *(" | ".join(group) for group in one.groups)]
    facts = {
        "version": version, "captions": len(found), "error_rows": len(lost),
        "sentences_per_caption": round(sentences / len(found), 2),
        "unique_sentences": job.summaries["paraphrase"]["known"] + job.summaries["paraphrase"]["units"],
    }  # fmt: skip
    return facts, lists


def publish_masks(job: Any, view: Any, options: GenerateOptions, name: str, source: str) -> Written:
    """Boxes rasterised to part masks as a side table."""
    from reid_dist.methods.muva.boxes import boxes_to_patches
    from reid_dist.methods.muva.masks import MaskRow, write_masks

    grounded = job.ground(unique_images(view))
    usable = {i: parts for i, parts in grounded.items() if all(record.usable for record in parts.values())}
    rows = []
    for image, parts in usable.items():
        boxes = {part: record.value for part, record in parts.items()}
        patches = boxes_to_patches(boxes, options.grid)
        rows.append(MaskRow(image, patches.visible, boxes, patches.fallback))
    version = write_masks(options.root, name, rows, options.grid, source)
    lists = {row.digest: {"Boxes": [f"{part}: {boxes}" for part, boxes in (row.boxes or {}).items()]} for row in rows}
    facts = {
        "version": version, "images": len(rows), "error_rows": len(grounded) - len(usable),
        "with_fallback": sum(bool(row.fallback) for row in rows),
    }  # fmt: skip
    return facts, lists


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
    lists = {image: {"Answers": [answer or "-" for answer in record.value]} for image, record in usable.items()}
    return {"version": version, "images": len(usable), "error_rows": len(described) - len(usable)}, lists


def write_page(kind: str, job: Any, view: Any, name: str, source: str, lists: dict[str, dict[str, list[str]]]) -> str:
    """The job's page below its ledger; returns its place."""
    import shlex
    import sys

    import numpy as np

    from reid_dist.reporting.generation import Reject, Sample, render_generation

    rows = unique_images(view)
    shown = [image for image in rows if image in lists]
    picked = [shown[i] for i in np.unique(np.linspace(0, len(shown) - 1, min(SHOWN, len(shown))).astype(int))]
    samples = []
    for image in picked:
        row = rows[image]
        own = {"Original captions": list(view.captions[row])} | lists[image]
        samples.append(Sample(view.encoded([row])[0], view.path(row), own))
    rejects = []
    for stage, record in job.rejects():
        said = record.facts["replies"][-1]["text"][:120] if record.facts["replies"] else ""
        rejects.append(Reject(stage, record.status, record.reason, said, record.key))
    page = render_generation(
        f"Generated: {name}", f"{kind} of {len(rows)} pictures of {view.describe()}.", samples, rejects, job.summaries,
        {"answers": source, "ledger": job.ledger.store.uri, **{t: str(v) for t, v in view.versions.items()}},
        shlex.join(["python", "-m", "jobs.generate", *sys.argv[1:]]),
        any("synthetic" in table.facts.notes for table in view.tables),
    )  # fmt: skip
    job.ledger.store.write(f"pages/{name}.html", page.encode())
    return f"{job.ledger.store.uri}/pages/{name}.html"


def plan(kind: str, view: Any, answering: Answering, options: GenerateOptions) -> dict[str, Any]:
    """Units, calls, tokens and engine-hours per stage: upper bounds where earlier stages decide."""
    import numpy as np

    from reid_dist.generation.image_budget import visual_tokens
    from reid_dist.generation.ledger import Ledger
    from reid_dist.storage import open_store

    images, captions = len(unique_images(view)), sum(len(set(texts)) for texts in view.captions)
    units = {"describe": images, "merge": captions, "split": captions, "paraphrase": captions * SENTENCES,
             "ground": 3 * images}  # fmt: skip
    pixels = answering.engine.pixels
    middle = (int(np.median(view.height)), int(np.median(view.width)))
    picture = visual_tokens(*middle, pixels=pixels) if pixels else SMALL_TOKENS
    ledger = Ledger(open_store(answering.ledger))
    stages: dict[str, Any] = {}
    for stage in STAGES[kind]:
        known = len(ledger.read(stage))
        left = max(0, units[stage] - known)
        calls = 0 if stage in answering.speak.rules else left * answering.speak.calls(stage)
        prompt, answer = answering.speak.tokens(stage)
        rate = options.rate or measured_rate(answering.ledger, stage)
        hours = round(calls / rate / 3600, 3) if rate else None
        stages[stage] = {
            "units": units[stage], "in_ledger": known, "calls": calls,
            "prompt_tokens": calls * (prompt + (picture if stage in ("describe", "ground") else 0)),
            "completion_tokens": calls * answer, "engine_hours": hours,
            "rate": rate, "rate_is": "given" if options.rate else "measured" if rate else "unknown: give rate=",
        }  # fmt: skip
    return {"pictures": images, "captions": captions, "engines": options.engines, "stages": stages}


if __name__ == "__main__":
    run_job("generate", main)
