"""Folders in object storage, such as ``s3://bucket/prefix``, through fsspec.

The storage itself writes an object whole or not at all. Reading and writing use a bounded amount of
memory, and a storage that does not answer is an error after a bounded time.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from features.errors import UserError
from features.extras import require_extra

CONNECT_SECONDS = 10
"""Seconds after which a connection that is not established is given up."""
READ_SECONDS = 30
"""Seconds without a byte after which a request is given up."""
ATTEMPTS = 2
"""Number of times that a failed request is sent, by each of the two libraries that repeat it."""
_SCHEME = "s3://"
OBJECTS_PER_PAGE = 1000
"""Most objects of one answer of a listing."""
_MOST_REASON = 200  # characters of a library's message
_NO_ACCESS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to an account that may use it"
)
_NOT_REACHED = "see to the network and to AWS_ENDPOINT_URL, and run the command again"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """One object below a folder."""

    name: str
    """Name relative to the folder, with slashes."""
    size: int
    """Bytes."""
    modified: datetime


def is_storage_url(text: str) -> bool:
    """Return True for the URL of a folder in object storage that mmrec can read."""
    return text.lower().startswith(_SCHEME)


class StorageFolder:
    """A folder in object storage. Threads may use it concurrently, and it can be pickled.

    Args:
        url: The URL, such as ``s3://bucket/prefix``. Nothing is requested from the storage yet.

    Raises:
        UserError: The URL is not that of a folder, or the package for its scheme is not installed.
    """

    def __init__(self, url: str) -> None:
        parts = url[len(_SCHEME) :].rstrip("/").split("/")
        if not is_storage_url(url) or not all(part.strip(".") for part in parts):
            raise UserError(
                f"{url} is no folder in object storage; write s3://BUCKET or s3://BUCKET/PREFIX"
            )
        self.bucket = parts[0]
        self.prefix = "/".join(parts[1:])
        self.url = _SCHEME + "/".join(parts)
        require_extra(self.url, "s3fs", "s3fs", "s3")
        self._opened: Any = None
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[type["StorageFolder"], tuple[str]]:
        """Pickle the URL alone: another process opens connections of its own."""
        return StorageFolder, (self.url,)

    def objects(self) -> Iterator[StoredObject]:
        """Yield every object below the folder in the order of the names; a page is in memory.

        Raises:
            UserError: The bucket does not exist or cannot be read.
        """
        start = f"{self.prefix}/" if self.prefix else ""
        more: dict[str, str] = {}
        while True:
            with storage_errors(self.url):
                page = self._files.call_s3(
                    "list_objects_v2",
                    Bucket=self.bucket,
                    Prefix=start,
                    MaxKeys=OBJECTS_PER_PAGE,
                    **more,
                )
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(start)
                if name and not name.endswith("/"):  # consoles write objects for empty folders
                    yield StoredObject(
                        name=name, size=entry["Size"], modified=entry["LastModified"]
                    )
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def find(self, name: str) -> StoredObject | None:
        """Return one object, or None if there is none of this name.

        Raises:
            UserError: The storage cannot be read.
        """
        try:
            with storage_errors(self.url):
                head = self._files.call_s3("head_object", Bucket=self.bucket, Key=self._key(name))
        except FileNotFoundError:
            return None
        return StoredObject(name=name, size=head["ContentLength"], modified=head["LastModified"])

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return the first bytes of an object, at most ``most_bytes``.

        Raises:
            FileNotFoundError: There is no such object.
            UserError: The storage does not give the object.
        """
        try:
            with storage_errors(self.url):
                data: bytes = self._files.cat_file(self._path(name), start=0, end=most_bytes)
                return data
        except _EmptyObjectError:
            return b""

    def download(self, name: str, path: Path) -> None:
        """Write an object to a file on this machine.

        Raises:
            FileNotFoundError: There is no such object.
            UserError: The storage does not give the object.
        """
        with storage_errors(self.url):
            self._files.get_file(self._path(name), str(path), max_concurrency=1)

    def upload(self, path: Path, name: str) -> None:
        """Write a file of this machine to an object, whole or not at all.

        Raises:
            UserError: The storage does not take the object.
        """
        with storage_errors(self.url):
            self._files.put_file(str(path), self._path(name), max_concurrency=1)

    def remove(self, names: list[str]) -> None:
        """Remove objects; those that do not exist are ignored.

        Raises:
            UserError: The storage does not remove them.
        """
        for name in names:
            with storage_errors(self.url):
                self._files.call_s3("delete_object", Bucket=self.bucket, Key=self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _path(self, name: str) -> str:
        return f"{self.bucket}/{self._key(name)}"

    @property
    def _files(self) -> Any:
        """The file system of fsspec, which is opened at the first use."""
        with self._opening:
            if self._opened is None:
                self._opened = import_module("fsspec").filesystem(
                    "s3",
                    skip_instance_cache=True,
                    use_listings_cache=False,
                    config_kwargs={
                        "connect_timeout": CONNECT_SECONDS,
                        "read_timeout": READ_SECONDS,
                        "retries": {"mode": "standard", "max_attempts": ATTEMPTS},
                    },
                )
                self._opened.retries = ATTEMPTS
            return self._opened


class _EmptyObjectError(Exception):
    """An object has no bytes, so a range of its bytes does not exist."""


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn the errors of the libraries about a folder into one line.

    Errors of files on this machine pass unchanged.

    Raises:
        FileNotFoundError: There is no such object.
        UserError: The storage cannot be reached, or refuses the request.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        code = _error_code(error)
        if code in ("InvalidRange", "416"):
            raise _EmptyObjectError from None
        if isinstance(error, FileNotFoundError) and code is not None and code != "NoSuchBucket":
            raise FileNotFoundError(str(error)) from None
        message = _explain(error, code, url)
        if message is None:
            raise
        raise UserError(message) from None


def _error_code(error: Exception) -> str | None:
    """Return the storage's code of an error; None if the storage did not answer."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    return str(response["Error"].get("Code")) if isinstance(response, dict) else None


def _explain(error: Exception, code: str | None, url: str) -> str | None:
    """Return the line for an error of the storage or the network, None for one of this machine."""
    botocore = import_module("botocore.exceptions")
    network = (
        botocore.ConnectionError, botocore.HTTPClientError, botocore.IncompleteReadError,
        import_module("aiohttp").ClientError, ConnectionError, TimeoutError,
    )  # fmt: skip
    account = (
        botocore.NoCredentialsError, botocore.PartialCredentialsError,
        botocore.CredentialRetrievalError, botocore.ProfileNotFound, PermissionError,
    )  # fmt: skip
    reason = " ".join(str(error).split())[:_MOST_REASON] or type(error).__name__
    if code == "NoSuchBucket":
        return f"the bucket of {url} does not exist; create it, or correct the URL"
    if isinstance(error, network):
        return f"{url} cannot be reached ({reason}); {_NOT_REACHED}"
    if isinstance(error, account) and (code is not None or not isinstance(error, OSError)):
        return f"{url} cannot be used without permission ({reason}); {_NO_ACCESS}"
    if code is not None or isinstance(error, botocore.BotoCoreError | ValueError):
        return f"{url} cannot be used ({reason}); correct the URL or the settings of the storage"
    return None
