"""Values of done keys: where they are kept, and how they are got back.

Small ones are kept in the lock table's record; others with the server, or at the place that the
option `results` names. `result_frames` has what is stored, `result_places` the places.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distlock_proto import lock_table_pb2 as pb
from run_once.buffers import Parts, sha256
from run_once.errors import (
    ResultDamagedError,
    ResultError,
    ResultMissingError,
)
from run_once.result_frames import HEADER_BYTES, Loaded, dump, load
from run_once.result_places import (
    WrongSizeError,
    is_object_name,
    object_name,
    open_place,
    opened_places,
)
from run_once.secret import Secret, load_secret

if TYPE_CHECKING:
    from run_once.client import Grant, LockClient
    from run_once.lease import Lease

__all__ = [
    "HEADER_BYTES",
    "Loaded",
    "ResultStore",
    "discard",
    "dump",
    "is_inline",
    "load",
]

logger = logging.getLogger(__name__)


class ResultStore:
    """Stores values of completed keys and gets them back.

    Small values travel inside the settlement and the reply; others are written or uploaded before
    the key is completed.

    Args:
        client: The typed client of the server, or what gives it when it is needed.
        secret: What values are signed with; None: `load_secret`, on first use.
        max_inline_bytes: Larger frames are uploaded; 0: as the server says.
        results: Where larger frames go instead, as the configuration has it; None: to the server.
    """

    def __init__(
        self,
        client: LockClient | Callable[[], LockClient],
        *,
        secret: Secret | None = None,
        max_inline_bytes: int = 0,
        results: str | None = None,
    ) -> None:
        self._given_client = client
        self._own_secret = secret
        self._max_inline_bytes = max_inline_bytes
        self._results = results

    @property
    def _client(self) -> LockClient:
        given = self._given_client
        return given() if callable(given) else given

    def store(
        self, lease: Lease | Grant, value: Any, run_s: float = 0.0, source_id: bytes = b""
    ) -> pb.Result:
        """Make the result with which a lease is completed.

        Args:
            lease: The lease (or its grant) on the key.
            value: The value.
            run_s: For how many seconds the call ran; 0: not known.
            source_id: Fingerprint of its function's source, of 4 bytes; empty: not known.

        Returns:
            The result to complete the key with; large values are where it says already.

        Raises:
            ResultError: The value cannot be stored, so the key must not be completed.
        """
        holder: Any = lease
        grant: Grant = getattr(holder, "grant", holder)
        data = dump(
            value,
            key=grant.key,
            token=grant.token,
            secret=self._secret(),
            run_s=run_s,
            source_id=source_id,
        )
        limit_bytes = self._max_inline_bytes or self._client.limits().max_inline_result_bytes
        if len(data) <= limit_bytes:
            return pb.Result(
                storage=pb.Result.STORAGE_INLINE, payload=bytes(data), size_bytes=len(data)
            )
        if self._results is None:
            return self._client.upload_result(grant, data, sha256(data))
        url = self._write(self._results, grant, data)
        return pb.Result(storage=pb.Result.STORAGE_URL, payload=url.encode(), size_bytes=len(data))

    def load(self, key: bytes, token: int, result: pb.Result) -> Loaded:
        """Return the value of a done key.

        Args:
            key: The key as stored.
            token: The token of its completion.
            result: Its result, as a reply had it.

        Returns:
            The value, and how long the call ran.

        Raises:
            ResultMissingError: The key is done without a value, or its value is gone.
            ResultDamagedError: The value is damaged.
            SignatureError: The value was signed with another secret.
            ResultError: The value cannot be loaded here, or is at a place that is not configured.
        """
        if result.storage == pb.Result.STORAGE_NONE:
            raise ResultMissingError(f"key {_shown(key)} is done, but no value was stored with it")
        if result.storage == pb.Result.STORAGE_URL:
            return self._load_from_place(key, token, result)
        data: bytes | memoryview
        if result.storage == pb.Result.STORAGE_INLINE and result.payload:
            data = result.payload
        else:
            data = self._client.download_result(key, token, result.size_bytes)
        return load(data, key=key, token=token, secret=self._secret())

    def _write(self, results: str, grant: Grant, data: bytes | Parts) -> str:
        """Write a value to the place; give its URL."""
        place = open_place(results)
        name = object_name(grant.key, grant.token, grant.claim_id)
        try:
            place.write(name, data)
        except Exception as error:
            raise ResultError(
                f"the value of key {_shown(grant.key)} cannot be written to {place.url(name)}, so "
                f"the key is not done ({type(error).__name__}: {error}): see to it, or change "
                "results="
            ) from error
        return place.url(name)

    def _load_from_place(self, key: bytes, token: int, result: pb.Result) -> Loaded:
        """Load a value from the configured place, and from no other that a server may name."""
        url = result.payload.decode("utf-8", "replace") or self._ask_where(key, token)
        parent, _, name = url.rpartition("/")
        value = f"the value of key {_shown(key)} is at {url}"
        how = f"set results= (or RUN_ONCE_RESULTS) to {parent}"
        if not is_object_name(name, key, token):
            raise ResultError(f"{value}, which is no name of ours: reset the key")
        if self._results is None:
            raise ResultError(f"{value}, and results= is not configured here: {how}")
        place = open_place(self._results)
        is_same = place.url(name) == url
        try:
            data = place.read(name, result.size_bytes)
        except FileNotFoundError:
            if is_same:
                raise ResultMissingError(f"{value}, and there it is missing") from None
            raise ResultError(f"{value}, and not at {place.url(name)}: {how}") from None
        except WrongSizeError as error:
            raise _damaged(value, place.url(name), how, error, is_same=is_same) from None
        except Exception as error:
            raise ResultError(
                f"{value} and cannot be read from {place.url(name)} "
                f"({type(error).__name__}: {error}): see to it, then try again"
            ) from error
        try:
            return load(data, key=key, token=token, secret=self._secret())
        except ResultDamagedError as error:
            raise _damaged(value, place.url(name), how, error, is_same=is_same) from None

    def _ask_where(self, key: bytes, token: int) -> str:
        """Ask for the URL that a reply had no room for."""
        result = self._client.lookup([key], want_results=True).results.get(key)
        if result is None or result.token != token or not result.payload:
            raise ResultMissingError(f"the value of key {_shown(key)} was replaced meanwhile")
        return result.payload.decode("utf-8", "replace")

    def _secret(self) -> Secret:
        if self._own_secret is None:
            self._own_secret = load_secret()
        return self._own_secret


def discard(key: bytes, token: int, result: pb.Result | None) -> None:
    """Delete a value that no done key names, if it is at a place of this process.

    Args:
        key: The key as stored.
        token: The token under which it was stored.
        result: The result that `ResultStore.store` made.
    """
    if result is None or result.storage != pb.Result.STORAGE_URL:
        return
    url = result.payload.decode("utf-8", "replace")
    name = url.rpartition("/")[2]
    if not is_object_name(name, key, token):
        return
    for place in opened_places():
        if place.url(name) == url:
            try:
                place.delete(name)
            except FileNotFoundError:
                pass
            except Exception as error:  # noqa: BLE001 (nothing rests on it)
                logger.warning("cannot delete %s, which nothing needs: %s", url, error)


def is_inline(result: pb.Result | None) -> bool:
    """Tell whether a result brings its value along."""
    return result is not None and result.storage == pb.Result.STORAGE_INLINE


def _damaged(value: str, url: str, how: str, error: Exception, *, is_same: bool) -> ResultError:
    """Make the error of an object that is not whole; only the original's damage is a loss."""
    if is_same:
        return ResultDamagedError(f"{value}, and damaged: {error}")
    return ResultError(
        f"{value}, and what is at {url} is damaged: {error}. If that is a copy, mend it, or {how}"
    )


def _shown(key: bytes) -> str:
    return repr(key.decode("utf-8", "backslashreplace"))
