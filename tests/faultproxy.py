"""A proxy in front of an S3 server that misbehaves on the wire, by a list, by a rule or on a seeded schedule.

One exchange per connection, so that a fault strikes one request: drop (closed before anything), stall (silence), 500, 503,
cut-request (half of the body arrives at the server), corrupt-request, lose-answer (stored, but nobody learns it), truncate and
corrupt-answer (one bit of the body). `hold` stops matching requests until its gate opens: a run stands still at a known place.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock
from urllib.parse import urlparse

SURVIVED = ("drop", "stall", "500", "503", "truncate", "lose-answer", "corrupt-answer", "cut-request")
Rule = Callable[[str, str], str]  # (method, path and query) -> a fault, or "" for none


@dataclass
class Gate:
    """Where matching requests wait. `reached`: one does."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def open(self) -> None:
        self.opened.set()


class FaultProxy:
    """`url` is what clients are given instead of `target`."""

    def __init__(self, target: str, stall_s: float = 2.0) -> None:
        place = urlparse(target)
        self.target, self.stall_s = (place.hostname, place.port), stall_s
        self.faults: list[str] = []  # taken from the front, one per exchange; empty: the rules decide
        self.rules: list[Rule] = []
        self.used: list[str] = []
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def storm(self, seed: int, share: float, kinds: Sequence[str] = SURVIVED) -> None:
        """That share of the exchanges fails, drawn by `seed`."""
        rng = random.Random(seed)
        self.rules.append(lambda method, path: rng.choice(list(kinds)) if rng.random() < share else "")

    def on(self, fault: str, method: str, part: str, times: int = 1) -> None:
        """The next `times` requests of `method` whose path or query contains `part` meet `fault`."""
        left = [times]

        def rule(verb: str, path: str) -> str:
            if verb != method or part not in path or left[0] == 0:
                return ""
            left[0] -= 1
            return fault

        self.rules.append(rule)

    def hold(self, method: str, part: str) -> Gate:
        """Matching requests wait until the gate opens."""
        gate = Gate()

        def rule(verb: str, path: str) -> str:
            if verb == method and part in path and not gate.opened.is_set():
                gate.reached.set()
                gate.opened.wait()
            return ""

        self.rules.append(rule)
        return gate

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            fault = ""
            with self._lock:
                if self.faults:
                    fault = self.faults.pop(0)
                    self.used.append(fault)
                    listed = True
                else:
                    listed = False
            if fault == "drop":
                return
            if fault == "stall":
                time.sleep(self.stall_s)
                return
            request = _request(client)
            if not listed:
                fault = self._by_rule(request)
            self._exchange(client, request, fault)

    def _by_rule(self, request: bytes) -> str:
        method, path, _ = request.partition(b"\r\n")[0].decode("latin-1").split(" ", 2)
        for rule in self.rules:  # one that is added while another holds the request counts too
            fault = rule(method, path)
            if fault:
                self.used.append(fault)
                return fault
        return ""

    def _exchange(self, client: socket.socket, request: bytes, fault: str) -> None:
        if fault == "drop":
            return
        if fault == "stall":
            time.sleep(self.stall_s)
            return
        if fault in ("500", "503"):
            client.sendall(f"HTTP/1.1 {fault} Oops\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            return
        if fault == "corrupt-request":
            request = _flip(request)
        with socket.create_connection(self.target) as server:
            request = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
            if fault == "cut-request":
                server.sendall(request[: -max(1, len(request.partition(b"\r\n\r\n")[2]) // 2)])
                return
            server.sendall(request)
            answer = b""
            while data := server.recv(65536):
                answer += data
        if fault == "lose-answer":
            return
        if fault == "truncate":
            answer = answer[: -max(1, len(answer.partition(b"\r\n\r\n")[2]) // 2)]
        client.sendall(_flip(answer) if fault == "corrupt-answer" else answer)

    def close(self) -> None:
        self._server.close()


def _request(client: socket.socket) -> bytes:
    """One whole HTTP request with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(client)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = {k.strip().lower(): v.strip() for k, _, v in (line.partition(b":") for line in head.split(b"\r\n")[1:])}
    if lines.get(b"expect", b"").lower() == b"100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect"))
    while len(body) < int(lines.get(b"content-length", b"0")):
        body += _more(client)
    return head + b"\r\n\r\n" + body


def _more(client: socket.socket) -> bytes:
    data = client.recv(65536)
    if not data:
        raise ConnectionResetError("the client went away")
    return data


def _flip(message: bytes) -> bytes:
    """One bit of the body flipped."""
    head, _, body = message.partition(b"\r\n\r\n")
    if not body:
        return message
    changed = bytearray(body)
    changed[len(changed) // 2] ^= 1
    return head + b"\r\n\r\n" + bytes(changed)


@contextmanager
def between(target: str, stall_s: float = 2.0) -> Iterator[FaultProxy]:
    """A proxy where the AWS variables point to, for this process and its children."""
    proxy = FaultProxy(target, stall_s)
    with mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": proxy.url}):
        try:
            yield proxy
        finally:
            proxy.close()
