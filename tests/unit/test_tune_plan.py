"""Plans: what fits a cluster, what cannot run and why, what is left to do. Small tables, no Ray."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import tune as job
from reid_dist.errors import RunError, UserError
from tests.worlds import small_table
from tuning.capacity import NodeShape, demand, how_many, merge_shapes, shapes_of_file, why_not
from tuning.cluster import connected_shapes, running_shapes
from tuning.driver import Books
from tuning.plan import Plan, estimate
from tuning.run import Asking, make_side_tables, prepare, summary, unblocked
from tuning.search import OptunaChooser
from tuning.state import DONE, SweepState
from tuning.sweep import Sweep, build_sweep

LAPTOP = [NodeShape("laptop", {"CPU": 2.0}, 1, 1)]


@pytest.mark.parametrize(
    ("nodes", "worker", "workers", "driver", "fit"),
    [
        ([({"CPU": 2.0}, 1)], {"CPU": 0.4}, 1, {"CPU": 0.1}, 4),
        ([({"CPU": 2.0}, 1)], {"CPU": 1.0}, 1, {"CPU": 0.1}, 1),  # the second driver would take a worker's room
        ([({"CPU": 2.0}, 1)], {"CPU": 1.0}, 2, {"CPU": 0.1}, 0),
        ([({"CPU": 8.0, "GPU": 4.0}, 3)], {"CPU": 1.0, "GPU": 1.0}, 1, {"CPU": 0.1}, 12),
        ([({"CPU": 8.0, "GPU": 4.0}, 3)], {"CPU": 1.0, "GPU": 1.0}, 4, {"CPU": 0.1}, 3),
        ([({"CPU": 8.0, "GPU": 4.0}, 1)], {"CPU": 1.0, "GPU": 0.5}, 1, {"CPU": 0.1}, 7),  # CPUs are what is short
        ([({"CPU": 4.0, "GPU": 4.0}, 1), ({"CPU": 4.0}, 1)], {"CPU": 1.0, "GPU": 1.0}, 1, {"CPU": 1.0}, 4),
        ([({"CPU": 0.0}, 1), ({"CPU": 4.0, "GPU": 1.0}, 2)], {"CPU": 2.0, "GPU": 1.0}, 1, {"CPU": 0.1}, 2),
        ([({"CPU": 4.0, "safe": 1.0}, 1), ({"CPU": 4.0}, 9)], {"CPU": 4.0}, 1, {"safe": 0.25}, 4),
    ],
)
def test_as_many_trials_as_can_be_packed(
    nodes: list[Any], worker: dict[str, float], workers: int, driver: dict[str, float], fit: int
) -> None:
    shapes = [NodeShape(str(number), resources, count) for number, (resources, count) in enumerate(nodes)]
    assert how_many(shapes, demand(worker, workers, driver), limit=100) == fit
    assert how_many(shapes, demand(worker, workers, driver), limit=2) == min(fit, 2)


def test_why_a_trial_does_not_fit_says_what_was_asked_and_what_there_is() -> None:
    reason = why_not(LAPTOP, demand({"CPU": 1.0, "GPU": 1.0}, 2, {"CPU": 0.1}))
    assert "1 CPU + 1 GPU fit on no node" in reason
    assert "1 x laptop (2 CPU; 1 running)" in reason
    assert "2 workers of 1 CPU and a driver do not fit at the same time" in why_not(
        LAPTOP, demand({"CPU": 1.0}, 2, {"CPU": 0.1})
    )


LAUNCHER = """
cluster_name: lab
max_workers: 4
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, node_config: {}}
  gpu: {resources: {CPU: 16, GPU: 4}, min_workers: 0, max_workers: 8, node_config: {}}
  cpu: {resources: {CPU: 8}, max_workers: 2, node_config: {}}
"""


def test_node_types_that_could_be_added_count(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(LAUNCHER)
    shapes = {shape.name: shape for shape in shapes_of_file(str(tmp_path / "lab.yaml"))}
    assert {name: shape.count for name, shape in shapes.items()} == {"head": 1, "gpu": 4, "cpu": 2}  # max_workers caps
    running = running_shapes(
        [
            {
                "Resources": {"CPU": 16.0, "GPU": 4.0, "memory": 1.0, "node:10.0.0.1": 1.0},
                "Labels": {"ray.io/node-group": "gpu"},
            },
            {"Resources": {"CPU": 8.0, "object_store_memory": 5.0}, "Labels": {}},
            {"Resources": {"CPU": 3.0}, "Labels": {}},
        ],
        list(shapes.values()),
    )
    joined = {shape.name: (shape.count, shape.running) for shape in merge_shapes(running, list(shapes.values()))}
    assert joined == {"node": (1, 1), "head": (1, 0), "gpu": (4, 1), "cpu": (2, 1)}


def test_node_types_of_the_connected_autoscaler_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray's autoscaler says of itself: a type without limit, one that runs already, and a node of none of them."""
    import ray
    from ray._private.state import state
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    config = ClusterConfig()
    config.node_group_configs.append(NodeGroupConfig(name="gpu", resources={"CPU": 16, "GPU": 4}, max_count=3))
    config.node_group_configs.append(NodeGroupConfig(name="cpu", resources={"CPU": 8}, max_count=-1))
    nodes = [
        {
            "Alive": True,
            "Resources": {"CPU": 16.0, "GPU": 4.0, "node:10.0.0.7": 1.0},
            "Labels": {"ray.io/node-group": "gpu"},
        },
        {"Alive": True, "Resources": {"CPU": 2.0}, "Labels": {}},
        {"Alive": False, "Resources": {"CPU": 64.0}, "Labels": {}},
    ]
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    found = {shape.name: (shape.count, shape.running) for shape in connected_shapes()}
    assert found == {"gpu": (3, 1), "cpu": (1000, 0), "node": (1, 1)}
    bundles = demand({"CPU": 1.0, "GPU": 1.0}, 2, {"CPU": 0.1})
    assert how_many(connected_shapes(), bundles, limit=100) == 6  # three nodes of four GPUs, of which one runs


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("a: [", "not valid YAML"),
        ("max_workers: 1", "no available_node_types"),
        (LAUNCHER.replace("{CPU: 8}", "{}"), "does not say"),
    ],
)
def test_a_wrong_cluster_file_is_refused(tmp_path: Path, text: str, telling: str) -> None:
    (tmp_path / "lab.yaml").write_text(text)
    with pytest.raises(UserError, match=telling):
        shapes_of_file(str(tmp_path / "lab.yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        shapes_of_file(str(tmp_path / "none.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    for name in ("synthetic-cuhk-pedes", "synthetic-regdb"):
        small_table(folder, name)
    return folder


def sweep_of(root: Path, **sections: Any) -> Sweep:
    sections = {"name": "s", "base": "comoe/tiny", "output": str(root / "sweeps"), **sections}
    sections["set"] = {"data.root": str(root), **sections.get("set", {})}
    return build_sweep(sections)


def record_of(sweep: Sweep) -> dict[str, Any]:
    record: dict[str, Any] = prepare(sweep, LAPTOP)[0].record()
    return record


def test_a_plan_counts_and_starts_nothing(root: Path) -> None:
    small = {"num_workers": 1, "cpus_per_worker": 0.4, "hours_per_trial": 2.0}
    record = record_of(sweep_of(root, axes={"optim.lr": [1e-3, 1e-4]}, protocol={"seeds": [1, 2, 3]}, resources=small))
    assert (record["trials"], record["to_run"], record["rows"], record["concurrent_trials"]) == (6, 6, 2, 4)
    assert record["steps"]["longest_trial"] == 20  # training.max_steps of comoe/tiny
    assert record["estimate"] == {
        "gpu_hours": 0.0, "gpu_hours_used": 0, "gpu_hours_budget": None, "hours": 4.0, "from": "resources.hours_per_trial",
    }  # fmt: skip
    assert record["impossible"] == []
    assert not (root / "sweeps").exists()


def test_gpu_hours_come_from_finished_trials_when_there_are_any(root: Path) -> None:
    sweep = sweep_of(root, axes={"optim.lr": [1e-3, 1e-4]}, resources={"gpus_per_worker": 0.5, "hours_per_trial": 9.0})
    outcomes = {f"t{i}": {"status": DONE, "seconds": 3600.0 * (i + 1), "gpu_hours": 0.5 * (i + 1)} for i in range(3)}
    gpus = [NodeShape("gpu", {"CPU": 8.0, "GPU": 1.0}, 1)]
    plan = Plan(sweep, gpus, outcomes=outcomes)
    plan.waiting = prepare(sweep, gpus)[0].waiting
    plan.place()
    assert plan.concurrent == 2
    found = estimate(plan, left=5)
    assert (found["gpu_hours"], found["gpu_hours_used"], found["hours"]) == (5 * 2.0 * 0.5, 3.0, 3 * 2.0)


def test_the_budget_leaves_out_the_last_trials(root: Path) -> None:
    record = record_of(sweep_of(root, axes={"optim.lr": [1e-3, 1e-4, 1e-5]}, budget={"trials": 2}))
    assert (record["trials"], record["left_out_by_budget"]) == (2, 1)


@pytest.mark.parametrize(
    ("sections", "telling"),
    [
        ({"set": {"data.train": ["nowhere"]}}, "jobs.pack"),
        ({"metric": "map"}, "metric='map': no trial reports it"),
        ({"metric": "mAP", "set": {"training.eval_every": 0}}, "training.eval_every=0"),
        ({"metric": "mAP", "set": {"training.select_on": "none"}}, "training.select_on=none"),
        ({"metric": "mAP", "set": {"training.select_on": "test"}}, "never chooses on the test split"),
        (
            {"metric": "mAP", "base": "rle/tiny", "set": {"training.select_on": "val", "training.eval_every": 1}},
            "no val split",
        ),
        ({"evaluate": [{"protocol": "sysu-all-single-shot"}]}, "cannot be scored by protocol sysu-all-single-shot"),
        ({"evaluate": [{"protocol": "nonsense"}]}, "no protocol 'nonsense'"),
        ({"evaluate": [{"test": ["synthetic-regdb"]}]}, "cannot be scored by protocol text-to-image"),
        ({"set": {"data.train_splits": ["train", "gallery"]}}, "learns from the test images of synthetic-cuhk-pedes"),
        ({"axes": {"model.experts": [1]}}, "top_k=2"),
        ({"resources": {"num_workers": 3}}, "do not fit at the same time"),
        ({"resources": {"use_gpu": True}}, "fit on no node"),
    ],
)
def test_what_cannot_run_is_flagged_with_the_reason(root: Path, sections: dict[str, Any], telling: str) -> None:
    reasons = [entry["reason"] for entry in record_of(sweep_of(root, **sections))["impossible"]]
    assert any(telling in reason for reason in reasons), reasons


def test_divisions_that_share_identities_with_the_test_side_are_kept_apart(root: Path) -> None:
    sweep = sweep_of(root, base="rle/tiny", protocol={"divisions": [0, 1]})
    plan, _ = prepare(sweep, LAPTOP)
    assert plan.problems == []
    assert [trial.recipe.data.trial for trial in plan.trials] == [0, 1]
    assert len({trial.name for trial in plan.trials}) == 2


def test_an_extended_file_runs_only_what_is_new(root: Path, tmp_path: Path) -> None:
    def planned(rates: list[float]) -> Plan:
        return prepare(sweep_of(root, output=str(tmp_path), axes={"optim.lr": rates}), LAPTOP)[0]

    before = planned([1e-3, 1e-4])
    state = SweepState(before.sweep.uri)
    state.write_index(before.sweep, [trial.name for trial in before.trials])
    state.end(before.trials[0].name, DONE, seconds=1.0)
    assert [trial.name for trial in planned([1e-3, 1e-4]).waiting] == [before.trials[1].name]
    after = planned([1e-3, 1e-4, 1e-5])
    assert len(after.trials) == 3
    assert before.trials[0].name not in {trial.name for trial in after.waiting}
    assert after.record()["of_other_settings_data_or_code"] == 0
    assert (
        planned([1e-4]).record()["of_other_settings_data_or_code"] == 1
    )  # the trial of 1e-3 is there, and not of this file
    state.store.write(f"outcomes/{before.trials[0].name}.json", b"{")
    with pytest.raises(UserError, match="cannot be read"):
        planned([1e-3, 1e-4])


def test_shared_runs_are_planned_only_for_trials_that_wait(root: Path, tmp_path: Path) -> None:
    shared = {
        "name": "first",
        "set": {"optim.lr": 1e-6, "training.select_on": "none"},
        "then": {},
        "without": ["optim.lr"],
    }
    sweep = sweep_of(root, output=str(tmp_path), axes={"optim.lr": [1e-3, 1e-4]}, shared=[shared])
    plan, _ = prepare(sweep, LAPTOP)
    assert [bool(trial.scorings) for trial in plan.waiting] == [False, True, True]
    state = SweepState(sweep.uri)
    state.write_index(sweep, [trial.name for trial in plan.trials])
    for trial in plan.trials:
        state.end(trial.name, DONE, seconds=1.0)
    assert prepare(sweep, LAPTOP)[0].waiting == []


def test_side_tables_are_made_once_by_the_job_that_the_file_names(root: Path, tmp_path: Path) -> None:
    draw = f"reid_dist.methods.muva draw-masks {root}/raw-synthetic-regdb table=x root={{root}} name=masks"
    refused = sweep_of(root, side_tables=[{"name": "masks", "make": "os.system x"}])
    with pytest.raises(UserError, match="must name a job"):
        make_side_tables(refused, str(tmp_path))
    there = tmp_path / "tables" / "masks.side.lance" / "_versions" / "1.manifest"
    there.parent.mkdir(parents=True)
    there.write_text("")
    make_side_tables(sweep_of(root, side_tables=[{"name": "masks", "make": draw}]), str(tmp_path))  # nothing is started


def run_words(*words: str) -> dict[str, Any]:
    record: dict[str, Any] = job.main(list(words))
    return record


def test_the_job_plans_and_refuses_before_anything_starts(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("name: s\nbase: comoe/tiny\naxes: {optim.lr: [1e-3, 1e-4]}\n")
    places = (f"data.root={root}", f"output={tmp_path}/out")
    (tmp_path / "lab.yaml").write_text(LAUNCHER)
    plan = run_words(str(file), *places, "sweep.resources.num_workers=4", f"cluster={tmp_path}/lab.yaml", "--plan")[
        "plan"
    ]
    assert (plan["trials"], plan["concurrent_trials"]) == (2, 2)
    assert json.loads(json.dumps(plan)) == plan
    impossible = run_words(str(file), *places, "data.train=[nowhere]", "--plan")["plan"]["impossible"]
    assert ["jobs.pack" in entry["reason"] for entry in impossible] == [True, True]
    for words, telling in {
        ("data.train=[nowhere]",): "2 impossible",
        ("model.experts=1",): "top_k=2",
        ("model.expert=1",): "did you mean 'experts'",
        ("sweep.axis=1",): "did you mean 'axes'",
        ("sweep.metric=nothing",): "no trial reports it",
        ("cluster=x.yaml",): "goes with --plan",
        ("--now",): "unknown option",
        ("other.yaml",): "name one sweep",
    }.items():
        with pytest.raises(UserError, match=telling):
            run_words(str(file), *places, *words)
    assert not (tmp_path / "out").exists()


def sweep_file(folder: Path, **sections: Any) -> str:
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": "s", "base": "comoe/tiny", "metric": "mAP", **sections}))
    return str(folder / "sweep.yaml")


COLD = {"name": "optuna", "samples": 2}
WARM = {**COLD, "warm_start": ["{folder}/earlier"]}


@pytest.mark.parametrize(
    ("sections", "telling"),
    [
        ({"axes": {"optim.learning_rate": [1.0]}}, "axes.optim.learning_rate: recipe comoe/tiny has no such key"),
        ({"evaluate": [{"protocol": "sysu-all-single-shot"}]}, "cannot be scored by protocol sysu-all-single-shot"),
        ({"metric": "accuracy"}, "metric='accuracy': no trial reports it"),
        ({"axes": {"optim.lr": [1e-3, 1e-4]}, "search": WARM}, "earlier/sweep.json cannot be read"),
        ({"axes": {"optim.lr": [1e-3]}, "protocol": {"seeds": [1, 2]}, "search": COLD}, "at most one seed"),
        ({"name": "earlier"}, "earlier/sweep.json cannot be read"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("plan", [["--plan"], []])
def test_bad_input_ends_before_anything_starts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], telling: str, plan: list[str]
) -> None:
    """No Ray, no job that makes a side table, nothing written; and the same said by --plan."""
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "sweep.json").write_text("{")
    making = [{"name": "never", "make": "jobs.generate masks x root={root}"}]
    text = json.dumps({**sections, "side_tables": making}).replace("{folder}", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))

    def started(*words: Any, **named: Any) -> Any:
        raise AssertionError(f"{words} was started")

    monkeypatch.setattr("subprocess.run", started)
    monkeypatch.setattr(job, "connect", started)
    words = [sweep_file(tmp_path, **json.loads(text)), f"data.root={root}", f"output={tmp_path}", *plan]
    try:
        impossible = str(run_words(*words)["plan"]["impossible"])
    except UserError as error:
        impossible = str(error)
    assert telling in impossible
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "sweep.yaml"] == before


def test_side_tables_are_made_when_the_file_is_right_and_the_plan_is_checked_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the job that should make it succeeds and makes nothing."""
    said: list[list[str]] = []

    def run(words: list[str], **named: Any) -> Any:
        said.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr("subprocess.run", run)
    side = [{"name": "x", "file": "noise/x.npy", "make": "jobs.generate masks t root={root}"}]
    with pytest.raises(RunError, match="the jobs of side_tables ran, but x are still not under"):
        run_words(sweep_file(tmp_path, side_tables=side), f"data.root={root}", f"output={tmp_path}/out")
    assert [words[1:] for words in said] == [["-m", "jobs.generate", "masks", "t", f"root={root}"]]


def test_what_optuna_asked_for_is_noted_first_and_continued_after_a_kill(root: Path, tmp_path: Path) -> None:
    sweep = sweep_of(
        root, output=str(tmp_path), axes={"model.experts": [2, 3, 4, 5], "model.top_k": [1, 2, 3]}, metric="mAP",
        search={"name": "optuna", "samples": 4}, constraints=["model.top_k < model.experts"],
    )  # fmt: skip
    plan, checker = prepare(sweep, LAPTOP)
    assert (plan.trials, plan.samples, plan.problems) == ([], 4, [])
    state = SweepState(sweep.uri)
    books = Books(sweep, state, "the command")
    ask = Asking(books, checker, OptunaChooser(sweep), [], plan.samples)
    first, second = ask(), ask()
    assert first is not None
    assert second is not None
    assert set(state.planned()) == set(state.index()["trials"]) == {first.name, second.name}
    state.end(first.name, DONE, seconds=1.0, setting=dict(first.setting), value=0.5, metric="mAP", step=20)

    again, checker = prepare(sweep, LAPTOP)
    assert (len(again.trials), again.samples, [t.name for t in again.waiting]) == (2, 2, [second.name])
    books.trials = {trial.name: trial for trial in again.trials}
    ask = Asking(books, checker, OptunaChooser(sweep), again.waiting, again.samples)
    found = [ask() for _ in range(4)]
    assert found[0] == second
    assert found[3] is None
    rest = [trial for trial in found[1:3] if trial is not None]
    assert len({trial.name for trial in (first, second, *rest)}) == 4  # no setting is tried twice
    assert all(trial.setting["model.top_k"] < trial.setting["model.experts"] for trial in (first, second, *rest))


def test_trials_whose_shared_run_failed_say_so(root: Path, tmp_path: Path) -> None:
    shared = {
        "name": "first",
        "set": {"optim.lr": 1e-6, "training.select_on": "none"},
        "then": {},
        "without": ["optim.lr"],
    }
    sweep = sweep_of(root, output=str(tmp_path), axes={"optim.lr": [1e-3, 1e-4]}, shared=[shared])
    plan, _ = prepare(sweep, LAPTOP)
    state = SweepState(sweep.uri)
    free, blocked = unblocked(state, plan.trials)
    assert (free, blocked) == ([], 2)
    assert all("that it starts from failed" in failure["reason"] for failure in state.failures().values())
    with pytest.raises(RunError, match="2 of 3 runs failed"):
        summary(Books(sweep, state, "", trials={t.name: t for t in (*plan.shared, *plan.trials)}), plan, blocked, 0.0)
    state.end(plan.shared[0].name, DONE)
    assert unblocked(state, plan.trials) == (plan.trials, 0)
