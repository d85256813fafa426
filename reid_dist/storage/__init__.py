"""Storage: one place where URIs become stores, Lance options and Ray filesystems."""

from __future__ import annotations

import os
from typing import Any

from reid_dist.errors import UserError
from reid_dist.storage.base import AlreadyExists, CorruptionError, Entry, StorageError, Store, check_key, check_name
from reid_dist.storage.local import LocalStore

__all__ = [
    "AlreadyExists",
    "CorruptionError",
    "Entry",
    "StorageError",
    "Store",
    "cached_file",
    "check_key",
    "check_name",
    "is_remote",
    "lance_options",
    "lance_uri",
    "open_store",
    "ray_storage",
]


def _scheme(uri: str) -> str:
    """ "" for a path, else the scheme in lower case. Raises UserError for an unknown one."""
    scheme, separator, _ = uri.partition("://")
    if not separator:
        if not uri or "\0" in uri:
            raise UserError(f"{uri!r} names no place: give a folder, file:///folder or s3://bucket/prefix")
        return ""
    if scheme.lower() in ("gs", "gcs"):
        raise UserError(
            f"scheme {scheme}:// is not known: Google storage is reached as s3://bucket/prefix with "
            "AWS_ENDPOINT_URL=https://storage.googleapis.com and an HMAC key in the AWS_* variables"
        )
    if scheme.lower() not in ("file", "s3"):
        raise UserError(f"scheme {scheme[:20]!r} is not known: give a folder, file:///folder or s3://bucket/prefix")
    return scheme.lower()


def is_remote(uri: str) -> bool:
    """Whether a URI is an object store's. Raises UserError for an unknown scheme."""
    return _scheme(uri) == "s3"


def _local_path(uri: str) -> str:
    path = uri[len("file://") :] if uri.lower().startswith("file://") else uri
    if uri.lower().startswith("file://") and not path.startswith("/"):
        raise UserError(f"{uri}: a file URI is absolute: file:///folder")
    return os.path.abspath(os.path.expanduser(path))


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The store of a folder, file:// or s3:// URI; nothing is read or made yet. Raises UserError for anything else."""
    text = os.fspath(uri)
    if not is_remote(text):
        return LocalStore(_local_path(text))
    from reid_dist.storage.s3 import S3Store, parse_s3

    return S3Store(*parse_s3("s3://" + text.partition("://")[2]))


def lance_uri(uri: str) -> str:
    """The form of `uri` that Lance takes. Raises UserError."""
    return open_store(uri).uri


def lance_options(uri: str) -> dict[str, str]:
    """Lance's storage_options for `uri` with the credentials as they stand now: ask again for every use, never store or
    send them.

    A CA bundle reaches Lance (Rust) as SSL_CERT_FILE in the environment of the process.
    """
    if not is_remote(uri):
        return {}
    from reid_dist.storage.s3_connection import endpoint, make_session

    session = make_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise StorageError(f"{uri}: no credentials found: set the AWS_* variables, a profile or a role")
    frozen = credentials.get_frozen_credentials()
    options = {
        "aws_access_key_id": frozen.access_key,
        "aws_secret_access_key": frozen.secret_key,
        "aws_region": session.region_name or "us-east-1",
    }
    if frozen.token:
        options["aws_session_token"] = frozen.token
    if endpoint():
        options["aws_endpoint"] = endpoint()
        options["allow_http"] = str(endpoint().startswith("http://")).lower()
    return options


def ray_storage(uri: str) -> tuple[str, Any]:
    """(storage_path, storage_filesystem) for Ray's RunConfig; the filesystem is None for a folder.

    It carries no credentials: every process that unpickles it finds its own through the standard AWS chain.
    """
    if not is_remote(uri):
        return _local_path(uri), None
    import pyarrow.fs
    import s3fs

    from reid_dist.storage.s3 import parse_s3
    from reid_dist.storage.s3_connection import endpoint

    bucket, prefix = parse_s3(uri)
    filesystem = s3fs.S3FileSystem(endpoint_url=endpoint() or None, use_listings_cache=False, skip_instance_cache=True)
    return f"{bucket}/{prefix}".rstrip("/"), pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))


def cached_file(uri: str) -> str:
    """A local path with the content of `uri`: the file itself, or the node's copy of an object. Raises UserError."""
    from reid_dist.storage.cache import NodeCache

    return NodeCache().file(uri)
