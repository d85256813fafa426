"""Tune the multimodal model that confirms candidates (LoRA; methods/icl.md section 6): `python -m jobs.finetune_vlm RUN`.

From a trained text run: questions "does this picture show this person?" with hard negatives (the wrong pictures that the run
ranks highest), training by the common loop (Ray Train, DeepSpeed), an adapter, and a merged model folder that vLLM serves:
`jobs.interact RUN model=...`. See USAGE.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.config import Recipe
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.finetune_vlm RUN [key=value ...] [--plan] [--pairs]
  RUN          a trained text run: its ranking of the training pictures gives the hard negatives
  base=        the model to tune: `small` (built in; default), a folder, an s3:// prefix, OWNER/NAME of the hub (revision=)
  recipe=      default vlm/small for the small model, else vlm/locate (ICL's settings)
  negatives=1 captions=0 (0: all of a split) checkpoint=best (of RUN) images= (prefix of paths in the exported files)
  key=value    overrides of the recipe, for example name=mine output=s3://bucket/runs training.num_workers=4 model.rank=16
  --pairs      write the questions (also in LLaMA-Factory's format) and stop
  --plan       print what would run, start nothing
The record names `adapter` (for adapter=) and `model` (merged, for model=) of jobs.generate and jobs.interact."""

logger = logging.getLogger("reid_dist.jobs.finetune_vlm")


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What `jobs.finetune_vlm` takes beside the recipe's keys."""

    base: str = "small"
    revision: str = ""
    recipe: str = ""
    negatives: int = 1
    captions: int = 0
    checkpoint: str = "best"
    images: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.negatives <= 10:
            raise ValueError(f"negatives={self.negatives}: 1 to 10 (the best-ranked wrong pictures)")
        if self.captions < 0:
            raise ValueError(f"captions={self.captions}: 0 (all) or a number of captions")


def main(argv: list[str]) -> dict[str, Any]:
    from jobs._words import split_options

    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--plan", "--pairs"}, USAGE)
    if len(words) != 1:
        raise UserError(f"expected one RUN. {USAGE.splitlines()[0]}")
    options, overrides = split_options(TuneOptions, values, rest_allowed=True)
    return finetune(words[0], options, overrides, flags)


def finetune(run: str, options: TuneOptions, overrides: list[str], flags: set[str]) -> dict[str, Any]:
    """The job; returns the record. Raises UserError, RunError."""
    from jobs.train import train
    from reid_dist.generation.model_folder import find_model
    from reid_dist.generation.pairs import localiser
    from reid_dist.training.loaded import load_run
    from reid_dist.training.worker import open_data

    loaded = load_run(run, options.checkpoint)
    if loaded.spec.task != "text":
        raise UserError(f"{run}: method {loaded.spec.name} does not rank pictures by descriptions; give a text run")
    model = find_model(options.base, options.revision)
    asks = localiser(model.prompts)
    recipe = make_recipe(loaded.recipe, options, model, asks.answers, overrides)
    views = open_data(recipe)
    counts = {split: _captions(view, options.captions) for split, view in (("train", views.train), ("val", views.val))}
    questions = {split: len(pairs) * (1 + options.negatives) for split, pairs in counts.items()}
    if "--plan" in flags:
        steps = recipe.training.epochs * math.ceil(questions["train"] / recipe.training.global_batch)
        return {"plan": {"run": recipe.uri, "base": options.base, "base_digest": model.digest[:12], "prompt": asks.version,
                         "questions": questions, "steps": steps, "workers": recipe.training.num_workers}}  # fmt: skip
    made = make_pairs(loaded, recipe, views, counts, options, model, asks)
    if "--pairs" in flags:
        return {"questions": questions, **made}
    warmup = math.ceil(0.1 * recipe.training.epochs * made["train"] / recipe.training.global_batch)
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, pairs=made["pairs"]),
        schedule=dataclasses.replace(recipe.schedule, warmup=recipe.schedule.warmup or warmup),
    )  # fmt: skip
    facts = {"base": options.base, "base_digest": model.digest, "prompt": asks.version, "questions": made["pairs"],
             "negatives_from": f"{run} {loaded.checkpoint}", "run": recipe.uri}  # fmt: skip
    from jobs._cluster import connect

    with connect(math.ceil(recipe.training.num_workers * recipe.training.cpus_per_worker) + 1):
        record = train(recipe)
        record |= _on_worker(recipe, facts)
    return record | {"questions": questions, **made}


def make_recipe(
    searched: Recipe, options: TuneOptions, model: Any, answers: tuple[str, str], overrides: list[str]
) -> Recipe:
    """The recipe of the tuning, on the tables of the retrieval run. Raises UserError."""
    from reid_dist import methods
    from reid_dist.config import read_mapping, to_mapping

    name = options.recipe or ("vlm/small" if model.prompts == "tiny" else "vlm/locate")
    data = to_mapping(searched.data)
    own = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    folder = options.base == "small" or options.base.startswith("s3://") or not Path(options.base).is_dir()
    base = options.base if folder else str(Path(options.base).resolve())
    told = [f"output={searched.output}", f"model.base={base}", f"model.revision={json.dumps(options.revision)}",
            f"model.base_digest={json.dumps(model.digest)}", f"model.answers={json.dumps(list(answers))}"]  # fmt: skip
    method = read_mapping(methods.recipe_path(name)).get("method")
    if method != "vlm":
        raise UserError(f"recipe={name} is of method {method}; give one of method vlm")
    return methods.load_recipe(name, [*own, *told, *overrides])


def _captions(view: Any, most: int) -> np.ndarray:
    """int64 [M, 2]: (row, caption number), evenly spread where there are more than `most`."""
    from reid_dist.data.captions import caption_pairs

    if view is None:
        return np.zeros((0, 2), np.int64)
    pairs = caption_pairs(view)
    if not most or len(pairs) <= most:
        return pairs
    return pairs[np.linspace(0, len(pairs) - 1, most).astype(np.int64)]


def make_pairs(loaded: Any, recipe: Recipe, views: Any, counts: dict[str, np.ndarray], options: TuneOptions, model: Any,
               asks: Any) -> dict[str, Any]:  # fmt: skip
    """The published questions: made once per (run, checkpoint, tables, base, prompt, options), then found again.

    Returns places ("pairs", "llama_factory") and numbers ("train", "val"). Raises UserError.
    """
    from reid_dist.generation.pairs import llama_factory_files
    from reid_dist.methods.vlm.questions import Line, write_lines
    from reid_dist.storage import open_store
    from reid_dist.storage.publish import committed, publish_folder, read_manifest

    request = {
        "run": loaded.run.uri, "checkpoint": loaded.checkpoint, "tables": views.train.versions, "base": model.digest,
        "prompt": asks.version, "seed": recipe.seed, "negatives": options.negatives, "captions": options.captions,
        "data": dataclasses.asdict(recipe.data), "images": options.images,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()[:12]
    store, prefix = open_store(recipe.data.root), f"questions/{recipe.name}-{key}"
    if prefix not in committed(store, "questions"):
        lines, exported = [], {}
        for split, view in (("train", views.train), ("val", views.val)):
            if not len(counts[split]):
                continue
            pairs = [
                pair
                for pair in _hard(loaded, view, counts[split], recipe.seed, options.negatives)
                if asks.ask(pair.text)
            ]
            images = view.digests(np.array([pair.row for pair in pairs]))
            lines += [Line(image, asks.ask(pair.text), asks.answers[not pair.answer], split)
                      for pair, image in zip(pairs, images, strict=True)]  # fmt: skip
            if split == "train":
                paths = {pair.row: f"{options.images}{view.path(pair.row)}" for pair in pairs}
                exported = llama_factory_files("questions", pairs, paths, asks)
        with tempfile.TemporaryDirectory(prefix="reid-questions-") as folder:
            for name, text in {"pairs.jsonl": write_lines(lines), **exported}.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            numbers = {split: sum(line.split == split for line in lines) for split in counts}
            publish_folder(store, prefix, folder, facts=request | numbers)
    manifest = read_manifest(store, prefix)
    place = f"{store.uri}/{manifest.folder}"
    numbers = {split: int(manifest.facts[split]) for split in ("train", "val")}
    return {"pairs": f"{place}/pairs.jsonl", "llama_factory": f"{place}/dataset_info.json", **numbers}


def _hard(loaded: Any, view: Any, captions: np.ndarray, seed: int, negatives: int) -> list[Any]:
    """Pairs over a view, ranked by the run. Raises UserError."""
    from reid_dist.generation.pairs import hard_pairs
    from reid_dist.methods.spec import EvalSide
    from reid_dist.training.encode import encode_side

    rows = np.arange(len(view), dtype=np.int64)
    gallery = encode_side(loaded, view, EvalSide("image", rows, np.zeros_like(rows)))
    query = encode_side(loaded, view, EvalSide("text", captions[:, 0], captions[:, 1]))
    texts = [view.captions[row][part] for row, part in captions.tolist()]
    return hard_pairs(
        texts, captions[:, 0], np.asarray(view.pid), query, gallery, loaded.spec.similarity, seed, negatives
    )


def _on_worker(recipe: Recipe, facts: dict[str, Any]) -> dict[str, Any]:
    """`finish` where a training worker would run: a head has no GPU and little memory."""
    import ray

    from reid_dist.config import to_mapping
    from reid_dist.training.launch import resources

    needs = resources(recipe)
    task = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=1)(finish)
    found: dict[str, Any] = ray.get(task.remote(to_mapping(recipe), facts))
    return found


def finish(mapping: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Answers about held-out people before and after, the adapter and the merged model in the run's place."""
    from reid_dist import methods
    from reid_dist.config import build_recipe
    from reid_dist.methods.vlm.export import save_adapter, save_merged
    from reid_dist.methods.vlm.method import judge
    from reid_dist.methods.vlm.model import base_folder
    from reid_dist.runs import Run
    from reid_dist.storage.publish import committed, publish_folder, read_manifest
    from reid_dist.training.context import RunContext
    from reid_dist.training.loaded import load_run
    from reid_dist.training.worker import open_data

    recipe = build_recipe(mapping, lambda name: methods.get(name).Config)
    run = Run.read(recipe.uri)
    if "merged/model" not in committed(run.store, "merged"):
        tuned = load_run(recipe.uri, "last", encodes=False)
        asked = judge(recipe, open_data(recipe))
        facts = facts | {"checkpoint": tuned.checkpoint}
        if asked is not None:
            ctx = RunContext(seed=recipe.seed)
            with tuned.model.peft.disable_adapter():
                facts["before"] = asked(tuned.model, ctx)
            facts["after"] = asked(tuned.model, ctx)
        with tempfile.TemporaryDirectory(prefix="reid-merged-") as folder:
            save_adapter(tuned.model, Path(folder, "adapter"), recipe.model.base, facts)
            save_merged(tuned.model, base_folder(recipe.model), Path(folder, "model"), facts)
            publish_folder(run.store, "merged/adapter", Path(folder, "adapter"), facts=facts)
            publish_folder(run.store, "merged/model", Path(folder, "model"), facts=facts)
    made = {name: read_manifest(run.store, f"merged/{name}") for name in ("adapter", "model")}
    places = {name: f"{run.store.uri}/{manifest.folder}" for name, manifest in made.items()}
    return {**places, "held_out": {key: made["model"].facts.get(key) for key in ("before", "after")}}


if __name__ == "__main__":
    run_job("finetune_vlm", main)
