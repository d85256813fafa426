"""The boto3 client of a process: made once, renewed when its credentials expired, its errors sorted into worth another
try or not.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from reid_dist.storage.base import TEMPORARY, CorruptionError, StorageError
from reid_dist.storage.retry import RetryPolicy, retry

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Ways to say "only if there is no such object": the S3 standard's, and Google's.
CONDITIONS = (("If-None-Match", "*"), ("x-goog-if-generation-match", "0"))

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_AGAIN = {
    *("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "RequestTimeout"),
    *("BadDigest", "InternalError", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict"),
    "IncompleteBody",
}
_REMEDIES = {
    "NoSuchBucket": "the bucket does not exist",
    "AccessDenied": "access denied: this identity may not do that here",
    "InvalidAccessKeyId": "the access key is unknown: check AWS_ACCESS_KEY_ID or the role",
    "SignatureDoesNotMatch": "the secret key does not fit the access key",
    "RequestTimeTooSkewed": "this machine's clock is off by more than 15 minutes: set it",
    "PermanentRedirect": "the bucket lies in another region: set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket lies in another region: set AWS_REGION",
    "QuotaExceeded": "the storage quota is used up",
    "403": "access denied: this identity may not do that here",
}


class Missing(Exception):
    """The server has no such key (or upload)."""


class Taken(Exception):
    """A conditional write found the key taken."""


class Connection:
    """Calls with bounded retries on one client. Thread-safe."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self._lock = threading.Lock()
        self._headers = threading.local()
        self._conditions: dict[str, tuple[str, str]] = {}
        self._client: Any = None

    def client(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = make_client(self.policy)
                self._client.meta.events.register("before-call.s3.PutObject", self._add_header)
            return self._client

    def renew(self) -> None:
        """Forget the client: the next call reads the credentials anew."""
        with self._lock:
            self._client = None

    def call(self, what: str, call: Callable[[Any], T]) -> T:
        """`call(client)`. Raises Missing, Taken, StorageError (one readable line, no secret in it)."""

        def attempt() -> T:
            try:
                return call(self.client())
            except Exception as error:
                raise self._sorted(error, what) from error

        return retry(attempt, what, self.policy, lambda e: str(e) if isinstance(e, (_Again, CorruptionError)) else None)

    def _sorted(self, error: Exception, what: str) -> Exception:
        """The error to raise: _Again when another try may help."""
        from botocore import exceptions as b
        from botocore.parsers import ResponseParserError

        if isinstance(error, b.ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if code in ("NoSuchKey", "NoSuchUpload", "404", "NotFound"):
                return Missing(what)
            if status == 412 or code == "PreconditionFailed":
                return Taken(what)
            if code in _EXPIRED:
                self.renew()
                return _Again("the credentials expired")
            if status >= 500 or code in _AGAIN:
                return _Again(f"the server answered {status} {code}")
            return StorageError(f"{what}: {_REMEDIES.get(code, f'the server refused: {status} {code}')}")
        if isinstance(error, (b.NoCredentialsError, b.PartialCredentialsError, b.CredentialRetrievalError)):
            return StorageError(f"{what}: no credentials found: set the AWS_* variables, a profile or a role")
        if isinstance(error, (b.SSLError,)):
            return StorageError(f"{what}: the server's certificate is not trusted: set AWS_CA_BUNDLE to its authority")
        if isinstance(error, (b.HTTPClientError, b.ConnectionError, b.IncompleteReadError, b.ResponseStreamingError)):
            return _Again(f"the server cannot be reached ({type(error).__name__})")
        if isinstance(error, ResponseParserError):  # a listing damaged on its way (it carries no checksum)
            return _Again("the server's answer cannot be read")
        if isinstance(error, (ConnectionError, TimeoutError)):  # from a socket that broke while a body was read
            return _Again(f"the server cannot be reached ({type(error).__name__})")
        if isinstance(error, b.BotoCoreError):
            return StorageError(f"{what}: {type(error).__name__}")
        return error

    def _add_header(self, params: dict[str, Any], **_: Any) -> None:
        header = getattr(self._headers, "value", None)
        if header:
            params["headers"][header[0]] = header[1]

    @contextlib.contextmanager
    def header(self, header: tuple[str, str]) -> Iterator[None]:
        """Puts of this thread carry one more (signed) header."""
        self._headers.value = header
        try:
            yield
        finally:
            self._headers.value = None

    def conditional(self, bucket: str, prefix: str) -> tuple[str, str]:
        """The header by which this server refuses to overwrite, found out by trying. Raises StorageError when there is
        none.
        """
        if bucket not in self._conditions:
            for header in CONDITIONS:
                if self._honours(bucket, prefix, header):
                    self._conditions[bucket] = header
                    break
            else:
                raise StorageError(
                    f"s3://{bucket}: this server overwrites on conditional writes, so two attempts of a run could not "
                    "be told apart; keep runs on a server that has them (AWS, MinIO, R2, Ceph, Google) or in a folder"
                )
        return self._conditions[bucket]

    def _honours(self, bucket: str, prefix: str, header: tuple[str, str]) -> bool:
        name = f"{prefix}/{TEMPORARY}probe-{uuid.uuid4().hex}".lstrip("/")

        def put(client: Any) -> None:
            with self.header(header):
                client.put_object(Bucket=bucket, Key=name, Body=b"probe")

        self.call(name, lambda client: client.put_object(Bucket=bucket, Key=name, Body=b"probe"))
        try:
            self.call(name, put)
        except Taken:
            return True
        except StorageError as error:
            logger.info("%s is not understood by the server of bucket %s: %s", header[0], bucket, error)
        finally:
            with contextlib.suppress(StorageError, Missing):
                self.call(name, lambda client: client.delete_object(Bucket=bucket, Key=name))
        return False


class _Again(Exception):
    """Another try may help."""


def make_session() -> Any:
    """A boto3 session on the standard chain of credentials."""
    import boto3

    return boto3.session.Session()


def make_client(policy: RetryPolicy) -> Any:
    """An S3 client without retries of its own."""
    from botocore.config import Config

    options: dict[str, Any] = {}
    if endpoint() and "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
        # Checksum trailers are AWS's own; other servers answer them with a signature error. Content-MD5 guards instead.
        options["request_checksum_calculation"] = "when_required"
    if endpoint() and "AWS_RESPONSE_CHECKSUM_VALIDATION" not in os.environ:
        options["response_checksum_validation"] = "when_required"
    return make_session().client(
        "s3",
        endpoint_url=endpoint() or None,
        config=Config(
            retries={"total_max_attempts": 1},
            connect_timeout=policy.connect_s,
            read_timeout=policy.read_s,
            max_pool_connections=32,
            **options,
        ),
    )


def endpoint() -> str:
    """The S3 endpoint that the AWS variables name; empty for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def connection(policy: RetryPolicy) -> Connection:
    """The connection of this process under the AWS variables as they stand."""
    return _connection(policy, tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))))


@functools.lru_cache(maxsize=16)
def _connection(policy: RetryPolicy, environment: tuple[tuple[str, str], ...]) -> Connection:
    return Connection(policy)
