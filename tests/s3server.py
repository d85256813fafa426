"""An S3 server for tests: moto's, in a thread, on a free loopback port, with a fault injector in front of its answers.

Use the `s3` fixture (import it into the test module or conftest), or `serve()` as a context manager outside pytest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest

Fault = Callable[[dict], tuple[int, bytes] | None]  # WSGI environment -> an answer of its own, or None to go on


@dataclass
class S3Server:
    """`uri` is an empty bucket's; requests go through `faults` (each may answer in the server's place)."""

    endpoint: str
    uri: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # (method, path)

    def fail(self, times: int, method: str, status: int, code: str, part: str = "") -> None:
        """The next `times` requests of `method` whose path or query contains `part` are answered with an S3 error."""
        left = [times]

        def fault(environ: dict) -> tuple[int, bytes] | None:
            where = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
            if left[0] == 0 or environ["REQUEST_METHOD"] != method or part not in where:
                return None
            left[0] -= 1
            return (
                status,
                f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode(),
            )

        self.faults.append(fault)


_current: list[S3Server] = []  # the one whose faults apply


@functools.cache
def _endpoint() -> str:
    """One server per test process: a daemon thread that ends with it."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    threaded = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    threaded.start()
    inner = threaded._server.app

    def app(environ: dict, start_response: Callable) -> object:
        for server in _current[-1:]:
            server.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            for fault in list(server.faults):
                answer = fault(environ)
                if answer is not None:
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                    headers = [("Content-Length", str(len(answer[1]))), ("Connection", "close")]
                    start_response(f"{answer[0]} Injected", headers)
                    return [answer[1]]
        return inner(environ, start_response)

    threaded._server.app = app
    host, port = threaded.get_host_and_port()
    return f"http://{host}:{port}"


@contextlib.contextmanager
def serve() -> Iterator[S3Server]:
    """Make a bucket and point the AWS variables at it; the variables are restored afterwards."""
    import boto3

    endpoint = _endpoint()
    bucket = f"reid-{uuid.uuid4().hex[:8]}"
    server = S3Server(endpoint, f"s3://{bucket}/top")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    variables = {
        "AWS_ACCESS_KEY_ID": "test-access-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-key-that-must-not-appear",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    with mock.patch.dict(os.environ, {**clean, **variables}, clear=True):
        boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
        _current.append(server)
        try:
            yield server
        finally:
            _current.remove(server)


@pytest.fixture
def s3() -> Iterator[S3Server]:
    """A fresh bucket."""
    with serve() as server:
        yield server
