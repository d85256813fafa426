"""`jobs.finetune_vlm` as it is typed: a trained text run, hard questions, Ray Train, the merged folder; the same line again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from reid_dist import methods
from reid_dist.config import to_mapping
from reid_dist.generation.model_folder import adapter_digest, find_model
from reid_dist.runs import Run, identity_of
from tests.dist.cells import train_recipe
from tests.worlds import read_record, small_tables


def text_run(root: Path) -> str:
    """A text run of some steps, trained in this process."""
    from reid_dist.training.loaded import facts_dict
    from reid_dist.training.worker import open_data

    recipe = methods.load_recipe("comoe/tiny", [f"data.root={root}", f"output={root}/runs", "training.max_steps=8"])
    small_tables(root, recipe)
    data = open_data(recipe)
    run = Run.open(recipe.uri, identity_of(recipe, data.train.versions), recipe)
    run.describe(model_facts=facts_dict(methods.get("comoe").facts(data)))
    train_recipe(to_mapping(recipe), run.uri)
    return run.uri


def job(run: str, *words: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, record, stderr)."""
    line = [sys.executable, "-m", "jobs.finetune_vlm", run, "name=mine", "captions=20", "training.epochs=1", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False)
    return done.returncode, read_record(done.stdout), done.stderr


def test_tuning_on_the_confusions_of_a_run(tmp_path: Path) -> None:
    run = text_run(tmp_path)
    code, plan, _ = job(run, "--plan")
    assert (code, plan["plan"]["questions"], plan["plan"]["steps"]) == (0, {"train": 40, "val": 32}, 2)
    assert not (tmp_path / "questions").exists()
    assert not (tmp_path / "runs" / "mine").exists()
    code, record, said = job(run)
    assert code == 0, said[-2000:]
    assert record["steps"] == 2
    merged = find_model(record["model"])
    assert merged.prompts == "tiny"
    assert adapter_digest(record["adapter"], find_model("small"))
    tuned = json.loads(Path(record["model"], "tuning.json").read_text())
    assert tuned["base_digest"] == find_model("small").digest
    assert set(record["held_out"]["before"]) == set(record["held_out"]["after"])
    assert record["held_out"]["before"] != record["held_out"]["after"]
    assert Run.read(record["run"]).card()["recipe"]["model"]["pairs"] == record["pairs"]
    code, again, said = job(run)
    assert code == 0, said[-2000:]
    assert again["already_done"]
    assert (again["model"], again["pairs"]) == (record["model"], record["pairs"])
    code, refused, _ = job(record["run"])
    assert code == 2
    assert "encodes nothing" in refused["error"]
