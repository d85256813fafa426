"""A bucket prefix as a store, through boto3.

Credentials, region, endpoint and CA bundle come from the standard AWS variables and files (AWS_PROFILE,
AWS_ENDPOINT_URL, AWS_CA_BUNDLE, roles of the machine or the pod); nothing of them is taken from a URI or written
anywhere. The default session refreshes expiring role credentials; when a token is found expired all the same, the
session is built anew and the call repeated.

Every object we write carries its SHA-256 as metadata, sends Content-MD5 (which every S3 server checks), and is verified
when read. Retries are ours (storage/retry.py), so that tries and total time are bounded; botocore's are switched off.

Google storage works through its S3 interface: AWS_ENDPOINT_URL=https://storage.googleapis.com, AWS_REGION=auto and an
HMAC key as AWS_ACCESS_KEY_ID / AWS_SECRET_ACCESS_KEY. Its conditional writes are spelled `x-goog-if-generation-match:
0`; which of the two spellings a server honours is probed before the first conditional write (storage/s3_connection.py),
and a server that honours none is refused for runs, because two attempts could not be told apart there. (Not tried here
against Google itself.)
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from reid_dist.errors import UserError
from reid_dist.storage.base import (
    MANY,
    TEMPORARY,
    AlreadyExists,
    CorruptionError,
    Entry,
    Names,
    StorageError,
    check_key,
    file_sha256,
    is_temporary,
)
from reid_dist.storage.local import explained, replace_file
from reid_dist.storage.retry import RetryPolicy
from reid_dist.storage.s3_connection import Connection, Missing, Taken, connection

logger = logging.getLogger(__name__)
T = TypeVar("T")

PART = 16 * 1024**2  # bytes of one part; files up to this size travel in one request
SLOWEST = 1024**2  # bytes per second: what a transfer must reach on average, beyond the policy's deadline


class S3Store:
    """s3://bucket/prefix."""

    def __init__(self, bucket: str, prefix: str = "", policy: RetryPolicy | None = None) -> None:
        self.bucket, self.prefix, self.policy = bucket, prefix.strip("/"), policy or RetryPolicy()
        if self.prefix:
            check_key(self.prefix)
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._connection: Connection = connection(self.policy)

    def __reduce__(self) -> Any:  # a client cannot travel to another process; the place can
        return S3Store, (self.bucket, self.prefix, self.policy)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)

    def _call(self, what: str, call: Callable[[Any], T]) -> T:
        return self._connection.call(f"s3://{self.bucket}/{what}", call)

    # --- reading

    def read(self, key: str) -> bytes:
        name = self._key(key)

        def get(client: Any) -> bytes:
            answer = client.get_object(Bucket=self.bucket, Key=name)
            data: bytes = answer["Body"].read()
            wanted = answer.get("Metadata", {}).get("sha256")
            if len(data) != answer["ContentLength"] or (wanted and hashlib.sha256(data).hexdigest() != wanted):
                raise CorruptionError(f"s3://{self.bucket}/{name}: the bytes received are not the ones written")
            return data

        with self._missing(name):
            return self._call(name, get)

    def download(self, key: str, path: str) -> None:
        name, target = self._key(key), Path(path)
        with self._missing(name):
            head = self._call(name, lambda client: client.head_object(Bucket=self.bucket, Key=name))
        temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                wanted = head.get("Metadata", {}).get("sha256")
                self._fetch_parts(name, temporary, head["ContentLength"], head["ETag"])
                if wanted and file_sha256(temporary) != wanted:  # once more: the wire or the object?
                    self._fetch_parts(name, temporary, head["ContentLength"], head["ETag"])
                    if file_sha256(temporary) != wanted:
                        raise CorruptionError(f"s3://{self.bucket}/{name}: the bytes received are not the ones written")
                replace_file(target, temporary)
            finally:
                temporary.unlink(missing_ok=True)

    def _fetch_parts(self, name: str, path: Path, size: int, etag: str) -> None:
        with open(path, "wb") as stream:
            stream.truncate(size)

            def part(start: int) -> None:
                length = min(PART, size - start)
                span = f"bytes={start}-{start + length - 1}"

                def get(client: Any) -> bytes:
                    answer = client.get_object(Bucket=self.bucket, Key=name, Range=span, IfMatch=etag)
                    data: bytes = answer["Body"].read()
                    if len(data) != length:
                        raise CorruptionError(f"s3://{self.bucket}/{name}: {len(data)} of {length} bytes received")
                    return data

                os.pwrite(stream.fileno(), self._call(name, get), start)

            self._in_parallel(part, range(0, size, PART), size, name)

    # --- writing

    def write(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        name = self._key(key)
        if not if_absent:
            self._put(name, data, hashlib.sha256(data).hexdigest())
            return
        header = self._connection.conditional(self.bucket, name.rpartition("/")[0])
        tries = 0

        def put(client: Any) -> None:
            nonlocal tries
            tries += 1
            with self._connection.header(header):
                client.put_object(**self._put_arguments(name, data, hashlib.sha256(data).hexdigest()))

        try:
            self._call(name, put)
        except Taken:
            # The answer to an earlier try may have been lost on the way although the server had stored the object.
            if tries > 1 and self.read(key) == data:
                return
            raise AlreadyExists(f"s3://{self.bucket}/{name} exists already") from None

    def upload(self, key: str, path: str) -> None:
        name = self._key(key)
        with explained(path):
            size = os.path.getsize(path)
            digest = file_sha256(path)
            if size <= PART:
                self._put(name, Path(path).read_bytes(), digest)
                return
        self._upload_parts(name, path, size, digest)

    def _put(self, name: str, data: bytes, digest: str) -> None:
        self._call(name, lambda client: client.put_object(**self._put_arguments(name, data, digest)))

    def _put_arguments(self, name: str, data: bytes, digest: str) -> dict[str, Any]:
        return {
            "Bucket": self.bucket,
            "Key": name,
            "Body": data,
            "ContentMD5": _md5(data),
            "Metadata": {"sha256": digest},
        }

    def _upload_parts(self, name: str, path: str, size: int, digest: str) -> None:
        length = max(PART, -(-size // 9000))  # a server takes 10000 parts at most
        place = {"Bucket": self.bucket, "Key": name}
        upload = self._call(name, lambda c: c.create_multipart_upload(**place, Metadata={"sha256": digest}))["UploadId"]
        parts: dict[int, str] = {}
        try:
            with explained(path), open(path, "rb") as stream:

                def part(start: int) -> None:
                    data = os.pread(stream.fileno(), length, start)
                    number = start // length + 1
                    facts = {**place, "UploadId": upload, "PartNumber": number, "ContentMD5": _md5(data)}
                    parts[number] = self._call(name, lambda client: client.upload_part(**facts, Body=data)["ETag"])

                self._in_parallel(part, range(0, size, length), size, name)
            listed = [{"PartNumber": number, "ETag": parts[number]} for number in sorted(parts)]
            self._complete(name, upload, listed, digest)
        except BaseException:
            with contextlib.suppress(StorageError, Missing):
                self._call(name, lambda client: client.abort_multipart_upload(**place, UploadId=upload))
            raise

    def _complete(self, name: str, upload: str, parts: Sequence[dict[str, Any]], digest: str) -> None:
        place = {"Bucket": self.bucket, "Key": name}
        try:
            self._call(
                name,
                lambda client: client.complete_multipart_upload(
                    **place, UploadId=upload, MultipartUpload={"Parts": parts}
                ),
            )
        except Missing:  # no such upload: an earlier try completed it and its answer was lost
            head = self._call(name, lambda client: client.head_object(**place))
            if head.get("Metadata", {}).get("sha256") != digest:
                raise StorageError(f"s3://{self.bucket}/{name}: the upload vanished before it was complete") from None

    def _in_parallel(self, part: Callable[[int], None], starts: range, size: int, name: str) -> None:
        """All parts on MANY threads, within the object's time: the policy's deadline and SLOWEST for the bytes."""
        limit = time.monotonic() + self.policy.deadline_s + size / SLOWEST
        if len(starts) == 1:
            part(starts[0])
            return
        pool = ThreadPoolExecutor(max_workers=MANY, thread_name_prefix="s3")
        try:
            for future in [pool.submit(part, start) for start in starts]:
                future.result(timeout=max(0.0, limit - time.monotonic()))
        except TimeoutError:
            raise StorageError(f"s3://{self.bucket}/{name}: {size} bytes were not transferred in time") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    # --- the rest

    def list(self, prefix: str = "") -> list[Entry]:
        return sorted(self._listed(prefix, hidden=False), key=lambda entry: entry.key.encode())

    def _listed(self, prefix: str, hidden: bool) -> Sequence[Entry]:
        top = f"{self.prefix}/" if self.prefix else ""
        found = []
        more: dict[str, str] = {}
        while True:
            ask = functools.partial(self._page, top + prefix, more)
            page = self._call(f"{top}{prefix}", ask)
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(top)
                if key and not key.endswith("/") and is_temporary(key) == hidden:
                    found.append(Entry(key, item["Size"], item["LastModified"].timestamp(), item["ETag"].strip('"')))
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, more: dict[str, str], client: Any) -> dict[str, Any]:
        answer: dict[str, Any] = client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, **more)
        return answer

    def stat(self, key: str) -> Entry:
        name = self._key(key)
        with self._missing(name):
            head = self._call(name, lambda client: client.head_object(Bucket=self.bucket, Key=name))
        return Entry(key, head["ContentLength"], head["LastModified"].timestamp(), head["ETag"].strip('"'))

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except FileNotFoundError:
            return False
        return True

    def delete(self, key: str) -> None:
        name = self._key(key)
        with contextlib.suppress(Missing):
            self._call(name, lambda client: client.delete_object(Bucket=self.bucket, Key=name))

    def delete_tree(self, prefix: str) -> None:
        folder = check_key(prefix.rstrip("/")) + "/"
        # One request per object: the many-object request needs checksums that not every S3 server understands.
        keys = [entry.key for hidden in (False, True) for entry in self._listed(folder, hidden)]
        with ThreadPoolExecutor(max_workers=MANY, thread_name_prefix="s3") as pool:
            list(pool.map(self.delete, keys))

    def sub(self, folder: str) -> S3Store:
        return S3Store(self.bucket, self._key(folder.rstrip("/")), self.policy)

    def sweep(self, older_than_s: float, *, plan: bool = False) -> Names:
        limit = time.time() - older_than_s
        old = [entry.key for entry in self._listed("", hidden=True) if entry.modified < limit]
        top = f"{self.prefix}/" if self.prefix else ""
        answer = self._call(top, lambda client: client.list_multipart_uploads(Bucket=self.bucket, Prefix=top))
        uploads = [u for u in answer.get("Uploads", ()) if u["Initiated"].timestamp() < limit]
        if not plan:
            for key in old:
                self.delete(key)
            for item in uploads:
                place = {"Bucket": self.bucket, "Key": item["Key"], "UploadId": item["UploadId"]}
                self._call(item["Key"], lambda client: client.abort_multipart_upload(**place))  # noqa: B023 - called at once
        return old + [f"{item['Key'].removeprefix(top)} (unfinished upload)" for item in uploads]

    @contextlib.contextmanager
    def _missing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Missing:
            raise FileNotFoundError(f"s3://{self.bucket}/{name} does not exist") from None


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def parse_s3(uri: str) -> tuple[str, str]:
    """(bucket, prefix) of an s3:// URI. Raises UserError for user info, queries and impossible buckets; never repeats
    them.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket or "?" in uri:
        raise UserError("an s3:// URI is s3://bucket/prefix: credentials and options belong into the AWS_* variables")
    if not 3 <= len(bucket) <= 63 or not all(c.isascii() and (c.isalnum() or c in ".-_") for c in bucket):
        raise UserError(f"s3 bucket {bucket!r}: a bucket's name has 3 to 63 letters, digits, '.', '-'")
    return bucket, prefix.strip("/")
