"""What a generation job would ask and cost, counted before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs._generation import Answering, measured_rate, unique_images

SMALL_TOKENS = 8  # of a picture, as the small model sees it
SENTENCES = 6  # of a merged caption, for estimates: unique sentences are far fewer in a corpus
OF_PICTURES = ("describe", "ground")


def plan(stages: Sequence[str], job: Any, view: Any, answering: Answering, rate: float = 0.0) -> dict[str, Any]:
    """Units, calls, tokens and hours per stage and in all.

    Stages that ask about pictures are counted exactly, against the ledger; of those that work on earlier answers an upper
    bound is given. `rate`: calls per second and engine; 0: what an earlier job measured, if one did.
    """
    images, captions = unique_images(view), sum(len(set(texts)) for texts in view.captions)
    most = {"merge": captions, "split": captions, "paraphrase": captions * SENTENCES}
    picture, found = _picture_tokens(view, answering.engine.pixels), {}
    for stage in stages:
        known = job.ledger.read(stage)
        if stage in OF_PICTURES:
            units = [unit.key for unit in job.image_units(stage, images).values()]
            count, have = len(units), sum(key in known for key in units)
        else:
            count = most[stage]
            version, model = job.speak.versions[stage], answering.maker.model
            have = sum(one.facts["prompt"] == version and one.facts["model"] == model for one in known.values())
        calls = 0 if stage in job.speak.rules else max(0, count - have) * job.speak.calls(stage)
        prompt, answer = job.speak.tokens(stage)
        measured = rate or measured_rate(answering.ledger, stage)
        hours = calls / measured / 3600 if measured else None if calls else 0.0
        found[stage] = {
            "units": count, "exact": stage in OF_PICTURES, "in_ledger": have, "calls": calls,
            "prompt_tokens": calls * (prompt + (picture if stage in OF_PICTURES else 0)),
            "completion_tokens": calls * answer, "engine_hours": hours,
            "rate": measured, "rate_is": "given" if rate else "measured" if measured else "unknown: give rate=",
        }  # fmt: skip
    return {
        "pictures": len(images), "captions": captions, "stages": found,
        "total": _total(found.values(), answering.options.engines, answering.options.tensor_parallel),
    }  # fmt: skip


def _total(stages: Any, engines: int, ranks: int) -> dict[str, Any]:
    """Sums; hours are unknown (None) when one stage's are."""
    total: dict[str, Any] = {
        name: sum(stage[name] for stage in stages) for name in ("calls", "prompt_tokens", "completion_tokens")
    }
    hours = [stage["engine_hours"] for stage in stages]
    known = None if None in hours else sum(hours)
    return total | {
        "engines": engines, "engine_hours": known, "gpu_hours": None if known is None else known * ranks,
        "hours": None if known is None else known / engines,
    }  # fmt: skip


def _picture_tokens(view: Any, pixels: int) -> int:
    import numpy as np

    from reid_dist.generation.image_budget import visual_tokens

    middle = (int(np.median(view.height)), int(np.median(view.width)))
    return visual_tokens(*middle, pixels=pixels) if pixels else SMALL_TOKENS
