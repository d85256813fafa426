"""No secret of the environment reaches anything that a run stores."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from reid_dist.runs import Run, identity_of, redact, ship_logs
from tests.unit.test_runs import DATA, recipe

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted/secret+value",
    "HF_TOKEN": "hf_plantedtoken",
    "WANDB_API_KEY": "plantedwandbkey",
    "AWS_SESSION_TOKEN": "plantedsession",
    "DB_PASSWORD": "plantedpassword",
}


def test_no_planted_secret_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets planted in the environment reach no file of a run, whichever way they come."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    text = " ".join(PLANTED.values()) + " https://user:plantedurl@host/x"
    chosen = recipe(tracking={"mlflow": "http://user:plantedurl@host:5000"})
    run = Run.open(str(tmp_path / "r1"), identity_of(chosen, DATA), chosen, command=f"python -m x {text}")
    with ship_logs(run, "driver"):
        logging.getLogger("reid_dist").info("env: %s", text)
        logging.getLogger("elsewhere").warning("env: %s", text)
    run.note_restart(reason=text, step=1)
    run.describe(extra={"deep": [text]})
    run.write_metrics({"kind": "eval", "step": 1, "text": text})
    run.request_stop(text)
    run.write_record({"exit_code": 1, "error": text})
    stored = {path: path.read_bytes() for path in (tmp_path / "r1").rglob("*") if path.is_file()}
    assert len(stored) >= 8
    for path, data in stored.items():
        for secret in [*PLANTED.values(), "plantedurl"]:
            assert secret.encode() not in data, path
    assert b"env: ***" in (tmp_path / "r1/logs/attempt-0001/driver.log").read_bytes()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://bucket/key@2 and a@b.c", "s3://bucket/key@2 and a@b.c"),
        ("https://u:p@host/x", "https://***@host/x"),
        ("?X-Amz-Signature=abcdef&x=1", "?X-Amz-Signature=***&x=1"),
        ("id AKIAABCDEFGHIJKLMNOP.", "id ***."),
        ('{"password": "hunter2hunter2"}', '{"password": "***"}'),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("token=abcdefgh12 next", "token=*** next"),
        ("tokens: 12345678 per second", "tokens: 12345678 per second"),
    ],
)
def test_redact_text(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_redact_leaves_short_and_public_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    monkeypatch.setenv("MY_TOKEN", "true")
    assert redact({"a": ["falsefalse true", 1, None, 2.5]}) == {"a": ["falsefalse true", 1, None, 2.5]}
