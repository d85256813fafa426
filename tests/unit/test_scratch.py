"""Folders of processes that were killed are removed by the next one; those of living processes are not."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from reid_dist.runs.scratch import Scratch, remove_abandoned

OWNER = """
import sys
from reid_dist.runs.scratch import Scratch
held = Scratch("log")
(held.path / "log").write_text("unsaved")
print(held.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_killed_process_leaves_nothing_for_long(place: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    path = Path(owner.stdout.readline().strip())
    assert (path / "log").read_text() == "unsaved"
    assert remove_abandoned("log") == 0  # it lives
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert path.exists()
    with Scratch("tensorboard"):
        assert path.exists()  # another kind
    with Scratch("log") as mine:
        assert list(place.iterdir()) == [mine.parent]
        assert remove_abandoned("log") == 0  # held by this process itself
    assert list(place.iterdir()) == []


def test_closing_twice_and_foreign_folders(place: Path) -> None:
    (place / "reid-log-other").mkdir()  # without a lock: not ours to judge
    scratch = Scratch("log")
    scratch.close()
    scratch.close()
    assert [path.name for path in place.iterdir()] == ["reid-log-other"]
