"""Peers that do not behave: they never speak, never finish a request, never read a reply."""

from __future__ import annotations

import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from distlock_proto import lock_table_pb2 as pb

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE: Final = 4
_TIMEOUT_S: Final = 20.0


class RawPeer:
    """An HTTP/2 connection that lets no reply through: its window for them is zero."""

    def __init__(self, host: str, port: int) -> None:
        """Connect and agree on the settings."""
        self._socket = socket.create_connection((host, port), timeout=_TIMEOUT_S)
        self._authority = f"{host}:{port}".encode()
        self._stream = -1
        no_window = struct.pack(">HI", _INITIAL_WINDOW_SIZE, 0)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, no_window))
        assert self._socket.recv(9), "the server does not answer"
        self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))

    def begin(self, method: str) -> int:
        """Begin a call of the lock table without its request; give the stream's number."""
        self._stream += 2
        fields = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", f"/distlock.v1.LockTable/{method}".encode()),
            (b":authority", self._authority),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
        block = b"".join(
            b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
            for name, value in fields
        )
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, self._stream, block))
        return self._stream

    def ask(self, method: str, request: bytes) -> None:
        """Send a whole call; its reply is never read."""
        stream = self.begin(method)
        content = b"\x00" + struct.pack(">I", len(request)) + request
        self._socket.sendall(_frame(_DATA, _END_STREAM, stream, content))

    def upload_half(self) -> None:
        """Begin an upload of a megabyte and send a little of it."""
        request = pb.UploadResultRequest(chunk=bytes(1 << 20)).SerializeToString()
        content = b"\x00" + struct.pack(">I", len(request)) + request[:8_000]
        self._socket.sendall(_frame(_DATA, 0, self.begin("UploadResult"), content))

    def close(self) -> None:
        """Be gone."""
        self._socket.close()


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def connect_silently(host: str, port: int, n_connections: int) -> list[socket.socket]:
    """Open connections on which nothing is ever said, or half of a greeting."""
    made = []
    for number in range(n_connections):
        peer = socket.create_connection((host, port), timeout=_TIMEOUT_S)
        if number % 2:
            peer.sendall(_PREFACE[:9])
        made.append(peer)
    return made


def is_closed(peer: socket.socket) -> bool:
    """Tell whether the other side has closed a connection."""
    peer.setblocking(False)
    try:
        while peer.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def many_files(n_files: int) -> Iterator[None]:
    """Let this process open so many files; skip the test where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < n_files:
        pytest.skip(f"this needs {n_files} open files, and {hard} are allowed")
    if soft == resource.RLIM_INFINITY or soft >= n_files:
        yield
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
