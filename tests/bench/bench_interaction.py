"""What interaction brings to trained text runs. As it comes out.

python -m tests.bench.bench_interaction [key=value ...]
    three methods on the synthetic world, each seed trained in this process: R1 before and after every round with the small
    model behind vLLM, and with the truth in its place as upper bound; calls against the released loop.
    seeds=[1,2,3] only=NAME steps=150 out=FOLDER (keeps tables and runs; what is there is not trained again)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jobs._cluster import connect
from jobs._generation import prepare
from jobs.demo import make_data
from jobs.interact import InteractOptions, encode, refine
from reid_dist import methods
from reid_dist.config import to_mapping
from reid_dist.data.store import open_view
from reid_dist.data.synthetic import World, world_for
from reid_dist.data.synthetic.identity import ATTRIBUTES, Attributes
from reid_dist.data.synthetic.oracle import shows
from reid_dist.data.synthetic.shots import text_shots
from reid_dist.evaluation.neighbours import nearest
from reid_dist.generation.engine import VllmEngine
from reid_dist.generation.interaction import Policy
from reid_dist.generation.ledger import Ledger, Maker
from reid_dist.generation.messages import Outcome, Request
from reid_dist.generation.stages import Answerer, InlineRunner, Job, dialogues
from reid_dist.generation.supervise import Supervised
from reid_dist.generation.tiny.questions import MATCH, attribute_answer, attribute_question
from reid_dist.runs import Run, identity_of
from reid_dist.storage import open_store
from reid_dist.training.loaded import load_run
from reid_dist.training.worker import open_data
from tests.bench.bench_generation import TABLE
from tests.dist.cells import train_recipe
from tests.scripted import ScriptedEngine

METHODS: dict[str, tuple[str, ...]] = {
    "ICL": ("icl/synthetic", "model.text_length=64"),
    "CoMoE": ("comoe/synthetic",),
    "plain CLIP": ("comoe/synthetic", "model.head=base", "model.losses=[sdm,itc]"),
}


class Oracle:
    """Truthful answers about a world's pictures, by their bytes."""

    def __init__(self, world: World) -> None:
        self.truth: dict[bytes, tuple[Attributes, frozenset[str]]] = {}
        for shot in text_shots(world):
            if shot.person.split == "test":
                sample, drawing = world.sample(shot)
                self.truth[sample.image] = (shot.person.attributes, drawing.visible())

    def __call__(self, request: Request) -> str:
        wear, seen = self.truth[request.image or b""]
        if request.text.startswith(MATCH):
            raise ValueError("match questions are answered from the caption itself")
        name = next(name for name in ATTRIBUTES if attribute_question(name) == request.text)
        return attribute_answer(name, wear, seen)


def oracle_job(world: World, view: Any, place: Path) -> Job:
    """A job whose search and descriptions are the truth."""
    oracle, speak = Oracle(world), dialogues("tiny")

    class Truthful(type(speak)):  # type: ignore[misc]
        async def locate(self, ask: Any, image: bytes, text: str) -> Any:
            wear, seen = oracle.truth[image]
            return Outcome(shows(wear, text, seen))

    truthful = Truthful(speak.prompts)
    ask = Supervised(lambda: ScriptedEngine(oracle, []), 60)
    runner = InlineRunner(Answerer(truthful, ask, lambda row: view.encoded([row])[0]))
    return Job(Ledger(open_store(place)).take(), Maker("oracle"), truthful, runner, runner)


def trained(root: Path, name: str, seed: int, steps: int) -> str:
    """A run of a method, trained in this process; its place."""
    recipe, *words = METHODS[name]
    built = methods.load_recipe(
        recipe,
        [f"data.root={root}", f"output={root}/runs", f"name={name.replace(' ', '-')}-{steps}-{seed}", f"seed={seed}",
         f"training.max_steps={steps}", "training.epochs=99", "training.num_workers=1", "training.eval_every=0",
         "training.checkpoint_every=0", *words],
    )  # fmt: skip
    if not open_store(built.uri).list("checkpoints/"):
        run = Run.open(built.uri, identity_of(built, open_data(built).train.versions), built)
        train_recipe(to_mapping(built), run.uri, attempt=run.attempt)
        run.write_record({"exit_code": 0})
    return str(built.uri)


@contextlib.contextmanager
def asked_model(root: Path, view: Any) -> Iterator[Job]:
    """A job over the small model behind one vLLM engine, which stays up while run after run asks."""
    answering = prepare(InteractOptions(root=str(root)), (TABLE,))
    loop = asyncio.new_event_loop()
    ask = Supervised(lambda: VllmEngine(answering.engine), 300, queue=8 * answering.engine.parallel)
    work = Answerer(answering.speak, ask, lambda row: view.encoded([row])[0])
    runner = InlineRunner(work, 8 * answering.engine.parallel, loop.run_until_complete)
    try:
        yield Job(
            Ledger(open_store(answering.ledger)).take(), answering.maker, answering.speak, runner, InlineRunner(work)
        )
    finally:
        loop.run_until_complete(ask.close())
        loop.close()


def rounds(seeds: tuple[int, ...] = (1, 2, 3), only: str = "", steps: int = 150, out: str = "") -> None:
    """Every method and seed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(out or folder)
        if not (root / "tables").exists():
            with connect():
                make_data(str(root), TABLE)
        names = [name for name in METHODS if only in name]
        runs = {(name, seed): trained(root, name, seed, steps) for seed in seeds for name in names}
        loaded = load_run(next(iter(runs.values())), "last")
        view = open_view(loaded.recipe.data, loaded.recipe.data.test)
        with asked_model(root, view) as job:
            truth = oracle_job(world_for("cuhk-pedes"), view, root / "oracle")
            found = {run: interaction(uri, view, job, truth, *run) for run, uri in runs.items()}
    for name in names:
        lines = [found[name, seed] for seed in seeds]
        means = {what: [line[what] for line in lines] for what in lines[0]}
        said = [
            f"{what} {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" for what, values in means.items()
        ]
        print(f"{name}: R1 {'; '.join(said)}")


def interaction(uri: str, view: Any, model: Job, truth: Job, name: str, seed: int) -> dict[str, float]:
    """R1 of one run before and after, with the model and with the truth."""
    encoded = encode(load_run(uri, "last"), view)
    # Similarities are on another scale in every run: half of the queries count as sure of their first candidate.
    best = nearest(encoded.query, encoded.gallery, 1, weights=encoded.shares).score[:, 0]
    policy = Policy(5, float(np.median(best)))
    records = {"small model": refine(encoded, model, policy, 60), "oracle": refine(encoded, truth, policy, 60)}
    for who, record in records.items():
        after = ", ".join(f"{one['rank1']:.3f}" for one in record["rounds"])
        print(
            f"{name}, seed {seed}, {who}: R1 {record['before']['rank1']:.3f}, after rounds {after}; mAP "
            f"{record['before']['mAP']:.3f} -> {record['after']['mAP']:.3f}; {record['accepted']} anchors, right "
            f"{record['anchors_right']}; asked {record['asked']} of {record['asked_by_released_loop']}", flush=True,
        )  # fmt: skip
    before = records["oracle"]["before"]["rank1"]
    return {"before": before} | {who: record["after"]["rank1"] for who, record in records.items()}


def main(words: list[str]) -> None:
    from reid_dist.methods.command import words_and_options

    plain, options = words_and_options(words)
    if plain:
        raise SystemExit(f"unknown: {' '.join(plain)}; only key=value is read")
    rounds(**options)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    main(sys.argv[1:])
