"""What must not leak, must not run and must not leave its place: secrets, markup, paths, code in data files."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import evaluate, runs
from jobs.postmortem import main as postmortem
from jobs.report import page_input, write_page
from reid_dist.data.records import Record
from reid_dist.data.side import open_side_table
from reid_dist.data.store import table_uri
from reid_dist.errors import UserError
from reid_dist.runs import Run, identity_of, ship_logs
from reid_dist.storage import check_name, open_store
from tests.colour import flat
from tests.tables import write_table
from tests.unit.test_redact import PLANTED
from tests.unit.test_runs import DATA, recipe

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


# --- secrets


def planted(text: bytes) -> list[str]:
    return [name for name, value in {**PLANTED, "in a URL": "plantedurl"}.items() if value.encode() in text]


def test_a_job_of_its_own_prints_no_secret() -> None:
    """Its stderr and stdout end in Ray's job log, which everybody who reaches the dashboard can read."""
    code = (
        "import os, logging; from jobs._job import run_job\n"
        "def main(argv):\n"
        "    logging.getLogger('elsewhere').warning('env %s http://u:plantedurl@h/', dict(os.environ))\n"
        "    raise RuntimeError('cannot reach https://u:plantedurl@host with ' + os.environ['HF_TOKEN'])\n"
        "run_job('probe', main)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **PLANTED}, capture_output=True)
    assert answer.returncode == 1
    record = json.loads(answer.stdout.splitlines()[-1])
    assert "cannot reach https://***@host with ***" in record["error"]
    assert b"env {" in answer.stderr
    assert b"RuntimeError" in answer.stderr
    assert planted(answer.stdout + answer.stderr) == []


def test_cards_logs_reports_and_postmortems_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    text = " ".join(PLANTED.values()) + " https://user:plantedurl@host/x"
    run = stored_run(tmp_path, text, tracking={"mlflow": "http://user:plantedurl@host:5000"})
    with ship_logs(run, "rank-0"):
        logging.getLogger("reid_dist").warning("env: %s", text)
    run.note_restart(reason=text, step=1)
    run.note("failure", rank=0, start=1, step=1, error=text, trace="t")
    run.note("hang", rank=0, start=1, step=1, seconds=9.0, waiting=False, where=text, stacks="logs/x")
    write_page(page_input(run.card(), run.metrics(), [evaluation(tmp_path, "a person")], None), run.store, None)
    told = json.dumps(postmortem([run.uri])) + json.dumps(runs.main(["show", run.uri]))
    stored = {path: path.read_bytes() for path in Path(run.uri).rglob("*") if path.is_file()}
    assert {"report.html", "card.json", "rank-0.log"} <= {path.name for path in stored}
    assert {path: planted(data) for path, data in stored.items() if planted(data)} == {}
    assert planted(told.encode()) == []
    assert "***" in told


def test_no_environment_travels_in_a_runtime_environment() -> None:
    """Ray shows runtime environments on its dashboard and keeps them in its logs: nothing of ours is put there."""
    named = [
        f"{path.relative_to(ROOT)}:{node.value.lineno}"
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg in ("runtime_env", "worker_runtime_env", "env_vars")
    ]
    assert named == []


# --- markup


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


def harmless(page: str) -> bool:
    tags = Tags(page).found
    return not any(
        tag in ("script", "iframe", "object") or any(a.startswith("on") for a in names) for tag, names in tags
    )


def stored_run(folder: Path, command: str, **more: Any) -> Run:
    chosen = recipe(method="comoe", **more)
    return Run.open(str(folder / "runs" / "r1"), identity_of(chosen, DATA), chosen, command=command)


def evaluation(folder: Path, label: str) -> dict[str, Any]:
    """A stored evaluation over a table of one captioned picture each of two people; `label` is a caption too."""
    records = [
        Record(path=f"{i} <b>{'x' * i}.png", split="test", pid=i, captions=(f"{label} {EVIL}",)) for i in range(2)
    ]
    write_table(str(folder), "t", records, [flat(9, 9, 9), flat(200, 9, 9)], folder / "raw")
    item = {"row": 0, "part": 0, "pid": 0, "correct": True, "score": 0.5}
    numbers = {"rank1": 0.5, "rank5": 0.5, "rank10": 0.5, "mAP": 0.5, "mINP": 0.5, "chance_mAP": 0.1, "chance_rank1": 0.1,
               "num_queries": 2, "num_invalid": 0, "tie_rate": 0.0}  # fmt: skip
    facts = {
        "checkpoint": "best",
        "step": 5,
        "protocol": "text-to-image",
        "tables": {"t": DATA["cuhk-pedes"]},
        "label": EVIL,
        "selected_on": EVIL,
    }
    listed = {"query": item, "query_kind": "text", "gallery_kind": "image", "top": [item], "ap": 0.5}
    return {
        "record": {**numbers, **facts},
        "data": {"root": str(folder), "tables": ["t"]},
        "lists": [listed],
        "figures": [],
    }


def test_report_of_a_run_whose_captions_and_names_are_scripts(tmp_path: Path) -> None:
    run = stored_run(tmp_path, EVIL)
    page = Path(
        write_page(page_input(run.card(), run.metrics(), [evaluation(tmp_path, "a person")], None), run.store, None)
    )
    text = page.read_text()
    assert "&lt;script&gt;alert(1)" in text  # the caption is there, as text
    assert harmless(text)
    assert not harmless(f"<p>{EVIL}</p>")


def test_search_page_of_files_whose_names_are_scripts(tmp_path: Path) -> None:
    paths = [f"{i}<script>alert(1)<{'b' * i}>.png" for i in range(3)]
    for path in paths:
        (tmp_path / path).write_bytes(flat(200, 9, 9))
    features = {"feat": np.eye(3, dtype=np.float32), "pid": np.arange(3), "path": np.array(paths)}
    np.savez(tmp_path / "x.npz", **features, split=np.array(["query", "gallery", "gallery"]))
    words = ["--search", str(tmp_path / "x.npz"), "--query", "row:0", f"images={tmp_path}", f"out={tmp_path}/page.html"]
    evaluate.main(words)
    assert harmless((tmp_path / "page.html").read_text())


# --- places


@pytest.mark.parametrize("name", ["../evil", "..", "/abs", "a/b", ".hidden", "a\\b", "", "a\nb", "%2e%2e/x", "x\0"])
def test_names_of_runs_and_tables_cannot_leave_their_folder(name: str, tmp_path: Path) -> None:
    def start() -> None:
        chosen = recipe(name=name, output=str(tmp_path / "runs"))
        Run.open(chosen.uri, identity_of(chosen, DATA), chosen)

    with pytest.raises(UserError):
        start()
    for refuse in (
        lambda: check_name(name),
        lambda: table_uri(str(tmp_path), name),
        lambda: open_side_table(str(tmp_path), name),
    ):
        with pytest.raises(UserError):
            refuse()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/../other", "s3://bucket/a/../../b", "s3://bucket/a//b", "s3://../b", "file://../x", "s3://u:p@b/x"],
)
def test_uris_that_climb_are_refused(uri: str) -> None:
    with pytest.raises(UserError):
        open_store(uri).list()


def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    """A checkpoint is an archive of a kind: what it unpacks to is named by data from the bucket."""
    import hashlib

    from reid_dist.storage import publish

    store = open_store(tmp_path / "store")
    text = json.dumps({"files": {"../../escaped": [1, hashlib.sha256(b"x").hexdigest()]}, "facts": {}}).encode()
    store.write("c/tag/manifest.json", text)
    store.write(
        "c/COMMITTED", json.dumps({"folder": "tag", "manifest_sha256": hashlib.sha256(text).hexdigest()}).encode()
    )
    (tmp_path / "store" / "escaped").write_bytes(b"x")
    with pytest.raises(UserError, match="not a storage key"):
        publish.fetch(store, "c", tmp_path / "out" / "deep")
    marker = {"folder": "../../elsewhere", "manifest_sha256": "0"}
    store.write("c/COMMITTED", json.dumps(marker).encode())
    with pytest.raises((UserError, RuntimeError)):
        publish.fetch(store, "c", tmp_path / "out")
    assert not (tmp_path / "escaped").exists()


# --- code in data files


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("reid_dist", "jobs", "tuning", "cluster"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def unsafe(tree: ast.Module) -> list[str]:
    """Calls that read code from data, or unpack archives without looking at the names in them."""
    safe_loaders = {"yaml.SafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "yaml.SafeLoader" for base in node.bases)
    }
    wrong = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        loader = words.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
        bad = (
            (name in ("yaml.load", "yaml.load_all") and loader not in safe_loaders)
            or name
            in ("yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "exec", "eval", "joblib.load")
            or (name == "torch.load" and words.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and words.get("allow_pickle") != "False")
            or name.rpartition(".")[2] in ("extractall", "unpack_archive")
        )
        wrong += [f"line {node.lineno}: {name}"] if bad else []
    return wrong


def test_nothing_reads_code_from_data_or_unpacks_blindly() -> None:
    found = {str(path.relative_to(ROOT)): unsafe(tree) for path, tree in sources()}
    assert len(found) > 100
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    ["yaml.load(x)", "yaml.load(x, yaml.Loader)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)",
     "pickle.loads(b)", "tarfile.open(p).extractall('.')", "shutil.unpack_archive(p)", "eval(x)"],
)  # fmt: skip
def test_unsafe_calls_would_be_found(line: str) -> None:
    assert unsafe(ast.parse(line))
