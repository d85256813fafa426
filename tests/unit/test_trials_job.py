"""trials=: one run per train/test division, their average, and what must not be averaged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs import _cluster, _job, evaluate, report, train
from jobs import _trials as job
from reid_dist import methods
from reid_dist.config import Recipe
from reid_dist.data.store import open_view
from reid_dist.errors import UserError
from reid_dist.runs import Run, identity_of
from tests.worlds import small_table

TABLE = "synthetic-regdb"
SCORES = {0: (0.5, 0.4), 1: (0.9, 0.6), 2: (0.4, 0.2)}  # rank-1, mAP


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trials")
    small_table(folder, TABLE, num_test=6, trials=3)
    return folder


def recipe(root: Path, output: Path, *words: str) -> Recipe:
    return methods.load_recipe("rle/tiny", [f"data.root={root}", f"output={output}", *words])


def record_of(trial: int, **more: Any) -> dict[str, Any]:
    rank1, mean_ap = SCORES[trial]
    return {
        "protocol": "regdb-visible-to-thermal", "rank1": rank1, "rank5": 1.0, "mAP": mean_ap, "mINP": 0.1,
        "chance_mAP": 0.1, "chance_rank1": 0.05, "num_queries": 30, "tie_rate": 0.0, "rerank": None, "label": "",
        "checkpoint": "step-00000020", "step": 20, "tables": {TABLE: {"rows": 120, "content": "c", "version": 1}},
        "method": "rle", "selected_on": "none", "trial": trial, **more,
    }  # fmt: skip


def finished(base: Recipe, *, done: bool = True) -> Run:
    run = Run.open(base.uri, identity_of(base, {TABLE: {"version": 1, "content": "c", "rows": 120}}), base)
    run.write_record({"job": "train", "exit_code": 0 if done else 1})
    return run


def three(root: Path, output: Path) -> None:
    for trial in range(3):
        finished(recipe(root, output, f"name=x-trial-{trial}", f"data.trial={trial}"))


def test_all_divisions_are_trained_each_in_a_place_of_its_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of the second run leaves the first one done; the same line again passes it over."""
    seen: list[tuple[str, int]] = []
    broken = {1}

    def fake(one: Recipe, plan_only: bool = False) -> dict[str, Any]:
        run = Run.open(one.uri, identity_of(one, {}), one)
        if run.finished is not None:
            return {"run": run.uri, "already_done": True}
        if one.data.trial in broken:  # before anything is known of the run's record
            raise UserError("bad data")
        seen.append((one.name, one.data.trial))
        _job.record_in(run.write_record)
        return {"run": run.uri}

    monkeypatch.setattr(train, "train", fake)
    monkeypatch.setattr(_cluster, "connect", lambda cpus: contextlib.nullcontext())
    base = recipe(root, tmp_path, "name=x")
    with pytest.raises(UserError, match="bad data"):
        job.train_trials(base, "all", plan_only=False)
    assert _job._store_record == []  # nobody else's failure is stored as the first run's
    assert json.loads((tmp_path / "x-trial-0/record.json").read_text())["exit_code"] == 0
    broken.clear()
    record = job.train_trials(base, "all", plan_only=False)
    assert seen == [("x-trial-0", 0), ("x-trial-1", 1), ("x-trial-2", 2)]
    assert record["trials"] == [0, 1, 2]
    assert [one.get("already_done", False) for one in record["runs"]] == [True, False, False]


def test_the_plan_of_all_divisions_starts_nothing(root: Path, tmp_path: Path) -> None:
    words = ["rle/tiny", "trials=[2,0]", f"data.root={root}", f"output={tmp_path}", "name=x", "--plan"]
    plan = train.main(words)["plan"]
    assert {name: one["train_ids"] for name, one in plan.items()} == {"x-trial-2": 3, "x-trial-0": 3}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trials=[3]", f"no division 3 of {TABLE}; it has 3, from 0"),
        ("trials=[1,1]", "named twice"),
        ("trials=[]", "at least one"),
        ("trials=some", "trials='some'"),
        ("trials=2", "trials=2"),
    ],
)
def test_words_that_name_no_division(word: str, message: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        train.main(["rle/tiny", word, f"data.root={root}", f"output={tmp_path}", "--plan"])
    assert message in str(error.value)


def test_a_set_without_divisions_is_refused() -> None:
    with pytest.raises(UserError, match="has one train/test division; leave the word out"):
        job.chosen("all", 1, "cuhk-pedes")


def test_mean_and_spread_by_hand() -> None:
    mean = job.average({trial: record_of(trial) for trial in SCORES})
    assert mean["rank1"] == pytest.approx(0.6)
    assert mean["mAP"] == pytest.approx(0.4)
    assert mean["rank1_std"] == pytest.approx((0.14 / 3) ** 0.5)  # (0.1^2 + 0.3^2 + 0.2^2) / 3
    assert mean["mAP_std"] == pytest.approx((0.08 / 3) ** 0.5)
    assert (mean["num_trials"], mean["num_queries"], mean["protocol"]) == (3, 30, "regdb-visible-to-thermal")
    assert [row["trial"] for row in mean["trials"]] == [0, 1, 2]
    assert [row["rank1"] for row in mean["trials"]] == [0.5, 0.9, 0.4]
    assert "trial" not in mean  # a mean of division numbers says nothing


def test_every_division_is_scored_by_its_own_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three(root, tmp_path)
    asked = []

    def fake(uri: str, options: Any, overrides: list[str], plan_only: bool) -> dict[str, Any]:
        asked.append((Path(uri).name, tuple(overrides)))
        return record_of(int(uri[-1]))

    monkeypatch.setattr(evaluate, "evaluate_run", fake)
    record = evaluate.main([f"{tmp_path}/x", "trials=all", "model.flip_test=true"])
    assert asked == [(f"x-trial-{trial}", ("model.flip_test=true",)) for trial in range(3)]
    assert record["rank1"] == pytest.approx(0.6)
    stored = json.loads(Path(record["stored"]).read_text())["record"]
    assert stored["mAP"] == pytest.approx(0.4)
    assert Path(record["stored"]).parent.parent == tmp_path / "x-trials"
    assert evaluate.main([f"{tmp_path}/x", "trials=[2,1]"])["rank1"] == pytest.approx(0.65)
    with pytest.raises(UserError, match="give one of them"):
        evaluate.main([f"{tmp_path}/x", "trials=all", "trial=1"])


def test_what_cannot_be_averaged_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run .*/x-trial-0: train the divisions"):
        job.runs_of(f"{tmp_path}/x", "all")
    three(root, tmp_path)
    assert list(job.runs_of(f"{tmp_path}/x", "all")) == [0, 1, 2]
    finished(recipe(root, tmp_path, "name=y-trial-0"))
    finished(recipe(root, tmp_path, "name=y-trial-2", "data.trial=2"), done=False)
    with pytest.raises(UserError, match=r"division 1, 2 of .*/y is not trained to the end"):
        job.runs_of(f"{tmp_path}/y", "all")
    assert list(job.runs_of(f"{tmp_path}/y", (0,))) == [0]
    finished(recipe(root, tmp_path, "name=y-trial-1", "data.trial=1", "optim.lr=0.5"))
    with pytest.raises(UserError, match=r"another experiment .* optim.lr: 0.002 there, 0.5 now"):
        job.runs_of(f"{tmp_path}/y", (0, 1))


def test_one_page_of_all_divisions(root: Path, tmp_path: Path) -> None:
    three(root, tmp_path)
    with pytest.raises(UserError, match="was not evaluated yet"):
        report.main([f"{tmp_path}/x", "trials=all"])
    for trial in range(3):
        store = Run.read(f"{tmp_path}/x-trial-{trial}").store
        for name, record in (("a", record_of(trial)), ("b", record_of(trial, checkpoint="start", step=0, rank1=0.01))):
            content = {"record": record, "lists": [], "figures": [], "data": {"root": str(root), "tables": [TABLE]}}
            store.write(f"evaluations/{name}.json", json.dumps(content).encode())
    made = report.main([f"{tmp_path}/x", "trials=all"])
    page = Path(made["report"]).read_text()
    assert made["report"] == str(tmp_path / "x-trials/report.html")
    assert "x, 3 divisions: rle" in page
    row = page[page.index("regdb-visible-to-thermal: mean of 3") :]
    assert row.index("60.0") < row.index("regdb-visible-to-thermal: division 0") < row.index("division 1")
    assert "regdb-visible-to-thermal Rank-1 21.6, mAP 16.3; regdb-visible-to-thermal, untrained Rank-1 0.0" in page
    assert "regdb-visible-to-thermal, untrained: mean of 3" in page


# ---- a model of another division


class Trained:
    """A run that learned from division 0, as far as refusals ask."""

    def __init__(self, base: Recipe) -> None:
        from reid_dist.config import to_mapping

        self.facts = {"recipe": to_mapping(base)}


@pytest.mark.parametrize("words", [["trial=1"], ["data.trial=1"]])
def test_no_word_scores_a_model_on_another_division(
    words: list[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.colour import loaded

    base = recipe(root, tmp_path)
    model = loaded(str(root), [TABLE], train=[TABLE], trial=int(words == ["data.trial=1"]))
    model = dataclasses.replace(model, run=Trained(base))  # type: ignore[arg-type]
    monkeypatch.setattr(evaluate, "load", lambda word, which, overrides: model)
    for protocol in ("regdb-visible-to-thermal", "regdb-thermal-to-visible"):
        with pytest.raises(UserError, match="must be scored by the model of trial 1, this one was trained on trial 0"):
            evaluate.main(["somewhere", f"protocol={protocol}", *words])


def test_no_other_name_of_the_table_scores_it_either(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same people under another table's name: the leak guard compares with what was trained on."""
    from tests.colour import loaded

    (root / "tables/again.lance").symlink_to(root / f"tables/{TABLE}.lance")
    model = loaded(str(root), ["again"], train=[TABLE], trial=1)
    model = dataclasses.replace(model, run=Trained(recipe(root, tmp_path)))  # type: ignore[arg-type]
    monkeypatch.setattr(evaluate, "load", lambda word, which, overrides: model)
    whole = open_view(recipe(root, tmp_path).data, [TABLE])
    both = {int(pid) for pid, splits in zip(whole.pid, whole.trials, strict=True) if splits[:2] == ("train", "test")}
    assert both
    with pytest.raises(UserError, match=f"test data stands in training: {len(both)} identities"):
        evaluate.main(["somewhere", "protocol=regdb-visible-to-thermal", "data.trial=1"])


def test_no_training_starts_from_a_model_of_another_division(root: Path, tmp_path: Path) -> None:
    first = finished(recipe(root, tmp_path, "name=first"))
    start = f"init=run:{first.uri}"
    with pytest.raises(UserError, match=r"was trained on people who are tested here: .* identities"):
        train.main(["rle/tiny", f"data.root={root}", f"output={tmp_path}", start, "data.trial=1", "--plan"])
    same = train.main(["rle/tiny", f"data.root={root}", f"output={tmp_path}", start, "--plan"])
    assert same["plan"]["train_ids"] == 3


def test_start_weights_whose_tables_are_elsewhere_are_said(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished(recipe(root, tmp_path, "name=first", "data.train=[far-away]"))
    base = recipe(root, tmp_path, f"init=run:{tmp_path}/first")
    train.check_start(base, open_view(base.data, [TABLE]))
    assert "tables far-away are not under" in caplog.text
