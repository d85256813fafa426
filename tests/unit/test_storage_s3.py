"""The bucket alone: retries, refusals, conditional writes, multipart, verification."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from reid_dist import storage
from reid_dist.storage import AlreadyExists, CorruptionError, StorageError, s3_connection
from reid_dist.storage import s3 as s3_module
from reid_dist.storage.retry import RetryPolicy, retry
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture

QUICK = RetryPolicy(tries=4, base_s=0.01, cap_s=0.05, deadline_s=5, connect_s=2, read_s=2)


@pytest.fixture
def quick(s3: S3Server) -> s3_module.S3Store:  # noqa: F811
    """A bucket with short retries."""
    return s3_module.S3Store(*s3_module.parse_s3(s3.uri), QUICK)


# --- retries


def test_retry_is_bounded_by_tries_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        raise ConnectionError("gone")

    with pytest.raises(StorageError, match=r"what: gone \(4 tries"):
        retry(fails, "what", QUICK, str)
    assert len(calls) == 4
    slow = RetryPolicy(tries=1000, base_s=0.05, cap_s=0.05, deadline_s=0.3)
    started = time.monotonic()
    with pytest.raises(StorageError, match="gone"):
        retry(fails, "what", slow, str)
    assert time.monotonic() - started < 2
    with pytest.raises(ConnectionError):
        retry(fails, "what", QUICK, lambda error: None)


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (400, "BadDigest")])
def test_passing_server_faults_are_retried(s3: S3Server, quick: s3_module.S3Store, status: int, code: str) -> None:  # noqa: F811
    s3.fail(2, "PUT", status, code)
    quick.write("k", b"value")
    s3.fail(2, "GET", status, code, "/k")
    assert quick.read("k") == b"value"
    assert sum(method == "PUT" for method, _ in s3.requests) == 3


def test_lasting_server_faults_end_in_one_line(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    s3.fail(-1, "PUT", 503, "SlowDown")
    with pytest.raises(StorageError, match=r"top/k: the server answered 503 SlowDown \(4 tries") as caught:
        quick.write("k", b"value")
    assert "secret-key" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("code", "remedy"), [("AccessDenied", "may not"), ("SignatureDoesNotMatch", "secret key")])
def test_refusals_are_not_retried(s3: S3Server, quick: s3_module.S3Store, code: str, remedy: str) -> None:  # noqa: F811
    s3.fail(-1, "PUT", 403, code)
    with pytest.raises(StorageError, match=remedy):
        quick.write("k", b"value")
    assert sum(method == "PUT" for method, _ in s3.requests) == 1


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("slow")])
def test_broken_sockets_are_retried(quick: s3_module.S3Store, error: Exception) -> None:
    left = [error]

    def once(client: object) -> str:
        if left:
            raise left.pop()
        return "done"

    assert quick._call("k", once) == "done"


def test_missing_bucket_and_unreachable_server(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with pytest.raises(StorageError, match="bucket does not exist"):
        s3_module.S3Store("no-such-bucket", "", QUICK).write("k", b"v")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="cannot be reached"):
        s3_module.S3Store("bucket", "", QUICK).list()


def test_no_credentials_is_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no credentials"):
        s3_module.S3Store("bucket", "", QUICK).read("k")
    with pytest.raises(StorageError, match="no credentials"):
        storage.lance_options("s3://bucket/x")


def test_expired_credentials_are_read_anew(
    s3: S3Server,  # noqa: F811
    quick: s3_module.S3Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client of a session whose token ran out is dropped and one with the new token made."""
    made: list[object] = []
    real = s3_connection.make_client
    monkeypatch.setattr(s3_connection, "make_client", lambda policy: made.append(1) or real(policy))
    quick._connection.renew()
    quick.write("a", b"1")
    s3.fail(1, "PUT", 400, "ExpiredToken")
    quick.write("b", b"2")
    assert len(made) == 2
    assert quick.read("b") == b"2"


def test_lost_answer_of_a_conditional_write_is_no_refusal(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    """The server stored the object but its answer was lost: the second try finds the key taken by ourselves."""
    quick.write("warm", b"x", if_absent=True)
    other = s3_module.S3Store(quick.bucket, quick.prefix, QUICK)
    done = []

    def stored_but_lost(environ: dict) -> tuple[int, bytes] | None:
        if environ["REQUEST_METHOD"] != "PUT" or not environ["PATH_INFO"].endswith("/mine") or done:
            return None
        done.append(1)
        other.write("mine", b"nonce")
        return 500, b""

    s3.faults.append(stored_but_lost)
    quick.write("mine", b"nonce", if_absent=True)
    with pytest.raises(AlreadyExists):
        quick.write("mine", b"other", if_absent=True)


def test_server_without_conditions_is_refused(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    def forget(environ: dict) -> None:
        environ.pop("HTTP_IF_NONE_MATCH", None)

    s3.faults.append(forget)
    with pytest.raises(StorageError, match="could not be told apart"):
        quick.write("k", b"v", if_absent=True)
    assert not quick.exists("k")


def test_server_with_googles_condition(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    """A server that knows only x-goog-if-generation-match is recognised and used (imitated here by translating the
    header).
    """

    def google(environ: dict) -> None:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        if environ.get("HTTP_X_GOOG_IF_GENERATION_MATCH") == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"

    s3.faults.append(google)
    quick.write("k", b"v", if_absent=True)
    with pytest.raises(AlreadyExists):
        quick.write("k", b"w", if_absent=True)


# --- multipart and verification


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(s3_module, "PART", 5 * 1024**2)
    return 5 * 1024**2


def test_multipart_upload_with_faults(
    s3: S3Server,  # noqa: F811
    quick: s3_module.S3Store,
    small_parts: int,
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "big", tmp_path / "copy"
    source.write_bytes(os.urandom(2 * small_parts + 12345))
    s3.fail(2, "PUT", 503, "SlowDown", "partNumber=2")
    quick.upload("big", str(source))
    assert sum(m == "PUT" for m, _ in s3.requests) == 5  # three parts, one of them three times
    s3.fail(1, "GET", 500, "InternalError", "/big")
    quick.download("big", str(target))
    assert target.read_bytes() == source.read_bytes()
    assert quick.stat("big").size == 2 * small_parts + 12345


def test_failed_multipart_leaves_nothing(
    s3: S3Server,  # noqa: F811
    quick: s3_module.S3Store,
    small_parts: int,
    tmp_path: Path,
) -> None:
    source = tmp_path / "big"
    source.write_bytes(bytes(2 * small_parts))
    s3.fail(-1, "PUT", 503, "SlowDown", "partNumber=2")
    with pytest.raises(StorageError, match="503"):
        quick.upload("big", str(source))
    assert quick.list() == []
    assert quick.sweep(-60) == []  # the upload was aborted, nothing is left to sweep


def test_unfinished_uploads_are_swept(s3: S3Server, quick: s3_module.S3Store) -> None:  # noqa: F811
    client = quick._connection.client()
    client.create_multipart_upload(Bucket=quick.bucket, Key=f"{quick.prefix}/half")
    assert quick.sweep(100 * 365 * 86400) == []  # moto dates every upload to 2010
    assert quick.sweep(-60) == ["half (unfinished upload)"]
    assert quick.sweep(-60) == []


def test_changed_bytes_are_not_taken(s3: S3Server, quick: s3_module.S3Store, tmp_path: Path) -> None:  # noqa: F811
    quick.write("k", b"good bytes")
    head = quick._connection.client().head_object(Bucket=quick.bucket, Key=f"{quick.prefix}/k")
    assert head["Metadata"]["sha256"] == hashlib.sha256(b"good bytes").hexdigest()
    client = quick._connection.client()
    client.put_object(Bucket=quick.bucket, Key=f"{quick.prefix}/k", Body=b"evil bytes", Metadata=head["Metadata"])
    with pytest.raises(CorruptionError, match="not the ones written"):
        quick.read("k")
    with pytest.raises(CorruptionError, match="not the ones written"):
        quick.download("k", str(tmp_path / "k"))
    assert list(tmp_path.iterdir()) == []


def test_truncated_answer_is_retried(s3: S3Server, quick: s3_module.S3Store, tmp_path: Path) -> None:  # noqa: F811
    quick.write("k", b"0123456789" * 100)
    left = [2]

    def truncate(environ: dict) -> tuple[int, bytes] | None:
        if environ["REQUEST_METHOD"] != "GET" or not environ["PATH_INFO"].endswith("/k") or not left[0]:
            return None
        left[0] -= 1
        return 206, b"0123"

    s3.faults.append(truncate)
    quick.download("k", str(tmp_path / "k"))
    assert (tmp_path / "k").read_bytes() == b"0123456789" * 100
    assert left == [0]
