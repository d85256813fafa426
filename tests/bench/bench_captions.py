"""What captions that the small model wrote bring to training. As it comes out.

python -m tests.bench.bench_captions [seeds=[2,3,4]] [epochs=6] [people=100] [warm=FILE]

Per seed one synthetic world: `jobs.generate rda` enriches its training captions with the small model behind vLLM, and ICL is
fine-tuned with and without them, with equal steps and from the same start weights (bench_icl's; kept in `warm`).
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

from tests.bench import bench_icl
from tests.bench.bench_generation import TABLE, run_job

WARM_PEOPLE, WARM_EPOCHS = 300, 6
RUNS = {"captions alone": "[]", "and the small model's": "[made]"}


def captions(
    seeds: tuple[int, ...] = (2, 3, 4), epochs: int = 6, people: int = 100, warm: str = ""
) -> dict[str, list[float]]:
    """{run: mAP by seed}; test scores are printed as they come."""
    found: dict[str, list[float]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        start = bench_icl.start_weights(Path(folder), warm, WARM_PEOPLE, WARM_EPOCHS)
        for seed in seeds:
            root = bench_icl.world(Path(folder), seed, people)
            made = run_job("jobs.generate", "rda", TABLE, f"root={root}", "name=made")
            print(
                json.dumps({"seed": seed} | {key: made[key] for key in ("captions", "calls", "sentences_per_caption")}),
                flush=True,
            )
            for name, groups in RUNS.items():
                words = [*bench_icl.SIZES, *bench_icl.FINE_TUNE, f"training.epochs={epochs}", "model.consensus=false"]
                run = bench_icl.fit(root, seed, [*words, f"model.groups={groups}"], start)
                found[name].append(run["scores"]["mAP"])
                line = {"seed": seed, "run": name, "mAP before": run["before"], **run["scores"], "steps": run["steps"]}
                print(json.dumps(line), flush=True)
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    given = dict(word.split("=") for word in sys.argv[1:])
    options = {key: value if key == "warm" else json.loads(value) for key, value in given.items()}
    for name, values in captions(**options).items():
        print(f"{name}: mAP {', '.join(f'{value:.3f}' for value in values)}")
