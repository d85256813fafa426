"""Generation: what our pipeline costs over vLLM alone, the small model's recipe, and what interaction brings.

python -m tests.bench.bench_generation                the same requests to vLLM directly and through jobs.generate, start left out
python -m tests.bench.bench_generation small          train the small model anew; prints its curve (some 15 minutes on one core)
python -m tests.bench.bench_generation interaction    CoMoE on the synthetic world, 3 seeds: before and after interaction with the
                                                      small model, and with the attribute oracle as upper bound (some 20 minutes)
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.config import DataConfig
from reid_dist.data.store import open_view
from reid_dist.data.synthetic import World, world_for
from reid_dist.data.synthetic.identity import ATTRIBUTES, Attributes
from reid_dist.data.synthetic.oracle import shows
from reid_dist.data.synthetic.shots import text_shots
from reid_dist.generation.engine import EngineConfig, VllmEngine
from reid_dist.generation.ledger import Ledger, Maker
from reid_dist.generation.messages import Request, Sampling
from reid_dist.generation.model_folder import find_model
from reid_dist.generation.stages import Answerer, InlineRunner, Job, dialogues
from reid_dist.generation.supervise import Supervised
from reid_dist.generation.tiny.questions import MATCH, attribute_answer, attribute_question
from reid_dist.storage import open_store
from tests.scripted import ScriptedEngine
from tests.worlds import small_table

TABLE = "synthetic-cuhk-pedes"


def run_job(*words: str) -> dict[str, Any]:
    """The record of a job in a process of its own."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {record.get('error')}\n{done.stderr[-2000:]}")
    return record


def direct_rate(requests: list[Request], parallel: int) -> float:
    """Requests per second of vLLM in one process, all given at once, after a warm-up of as many others."""

    async def ask() -> float:
        engine = VllmEngine(EngineConfig(path=find_model("small").path, context=512, eager=True, parallel=parallel))
        await engine.start()
        await asyncio.gather(*(engine.generate(request) for request in requests[:64]))
        start = time.perf_counter()
        await asyncio.gather(*(engine.generate(request) for request in requests))
        seconds = time.perf_counter() - start
        await engine.close()
        return len(requests) / seconds

    return asyncio.run(ask())


def overhead(root: Path, people: int = 60, parallel: int = 64) -> None:
    """Direct and through the job, in the same run."""
    small_table(root, TABLE, num_train=people, images_per_id=4)
    view = open_view(DataConfig(root=str(root)), (TABLE,), ("train",))
    images = view.encoded(np.arange(len(view)))
    requests = [Request(attribute_question(name), Sampling(1), image) for image in images for name in ATTRIBUTES]
    plain = direct_rate(requests, parallel)
    record = run_job("jobs.generate", "describe", TABLE, f"root={root}", f"parallel={parallel}")
    records = Ledger(open_store(record["ledger"])).read("describe").values()
    ends = [one.facts["created"] for one in records]
    starts = [one.facts["created"] - max(r["seconds"] for r in one.facts["replies"]) for one in records]
    calls = sum(len(one.facts["replies"]) for one in records)
    ours = calls / (max(ends) - min(starts))
    print(f"{calls} requests: vLLM alone {plain:.0f}/s, through the job {ours:.0f}/s, ratio {ours / plain:.3f}")


def small_model(folder: Path) -> None:
    """Train anew and print the curve."""
    from reid_dist.generation.tiny.train import Recipe, train

    for point in train(Recipe(), None, folder / "small.checkpoint").curve:
        print(json.dumps(point))


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
            from reid_dist.generation.messages import Outcome

            wear, seen = oracle.truth[image]
            return Outcome(shows(wear, text, seen))

    truthful = Truthful(speak.prompts)
    ask = Supervised(lambda: ScriptedEngine(oracle, []), 60)
    runner = InlineRunner(Answerer(truthful, ask, lambda row: view.encoded([row])[0]))
    return Job(Ledger(open_store(place)).take(), Maker("oracle"), truthful, runner, runner)


def interaction(root: Path, seeds: int = 3, threshold: float = 0.6) -> None:
    """Per seed: R1 and mAP before, with the small model, with the oracle."""
    from jobs.demo import make_data
    from jobs.interact import encode, refine
    from reid_dist.generation.interaction import Policy
    from reid_dist.training.loaded import load_run

    make_data(str(root), TABLE)
    world = world_for("cuhk-pedes")
    for seed in range(1, seeds + 1):
        run = run_job("jobs.train", "comoe/synthetic", f"data.root={root}", f"output={root}/runs", f"name=s{seed}",
                      f"seed={seed}")["run"]  # fmt: skip
        record = run_job("jobs.interact", run, f"threshold={threshold}")
        loaded = load_run(run)
        view = open_view(loaded.recipe.data, loaded.recipe.data.test)
        truth = refine(encode(loaded, view), oracle_job(world, view, root / f"oracle-{seed}"), Policy(5, threshold), 60)
        for name, found in (("small model", record), ("oracle", truth)):
            before, after = found["before"], found["after"]
            print(
                f"seed {seed}, {name}: R1 {before['rank1']:.3f} -> {after['rank1']:.3f}, mAP {before['mAP']:.3f} -> "
                f"{after['mAP']:.3f}; {found['accepted']} anchors, right {found['anchors_right']}; asked "
                f"{found['asked']} of {found['asked_by_released_loop']}"
            )


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else "overhead"
    with tempfile.TemporaryDirectory() as folder:
        {"overhead": overhead, "small": small_model, "interaction": interaction}[part](Path(folder))
