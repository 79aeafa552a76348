"""What can be done to the port below gRPC; each returns while its connections are still open."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable
from typing import Final

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SEND_S: Final = 2.0
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 8, 9


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """Make a frame of HTTP/2."""
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


_SETTINGS_FRAME: Final = frame(_SETTINGS, 0, 0, b"")


def _garbage(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 20_000))


def _silence(_rng: random.Random) -> bytes:
    return b""


def _half_preface(rng: random.Random) -> bytes:
    return _PREFACE[: rng.randrange(1, len(_PREFACE))]


def _http_1(rng: random.Random) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * rng.randrange(100_000)


def _tls(_rng: random.Random) -> bytes:
    return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(505)


def _settings_flood(rng: random.Random) -> bytes:
    return _PREFACE + _SETTINGS_FRAME * rng.randrange(1, 3_000)


def _ping_flood(rng: random.Random) -> bytes:
    return _PREFACE + _SETTINGS_FRAME + frame(_PING, 0, 0, bytes(8)) * rng.randrange(1, 3_000)


def _rapid_reset(rng: random.Random) -> bytes:
    """Open and reset streams as fast as can be."""
    header = b"\x83\x86\x44\x04/a/b"  # POST, http, a path
    pairs = (
        frame(_HEADERS, 4, stream, header) + frame(_RESET, 0, stream, bytes(4))
        for stream in range(1, 2 * rng.randrange(2, 500), 2)
    )
    return _PREFACE + _SETTINGS_FRAME + b"".join(pairs)


def _endless_headers(rng: random.Random) -> bytes:
    more = frame(_CONTINUATION, 0, 1, b"\x40\x01a\x7f\xff\x01" + b"b" * 382)
    return _PREFACE + _SETTINGS_FRAME + frame(_HEADERS, 0, 1, b"\x83") + more * rng.randrange(500)


def _random_frames(rng: random.Random) -> bytes:
    frames = (
        frame(rng.randrange(12), rng.randrange(256), rng.randrange(9), rng.randbytes(20))
        for _ in range(rng.randrange(1, 100))
    )
    return _PREFACE + _SETTINGS_FRAME + b"".join(frames)


def _huge_window(_rng: random.Random) -> bytes:
    return _PREFACE + _SETTINGS_FRAME + frame(_WINDOW, 0, 0, b"\x7f\xff\xff\xff") * 3


def _long_frame(_rng: random.Random) -> bytes:
    return _PREFACE + b"\xff\xff\xff" + struct.pack(">BBI", _DATA, 0, 1) + bytes(100_000)


ATTACKS: Final[tuple[Callable[[random.Random], bytes], ...]] = (
    _garbage,
    _silence,
    _half_preface,
    _http_1,
    _tls,
    _settings_flood,
    _ping_flood,
    _rapid_reset,
    _endless_headers,
    _random_frames,
    _huge_window,
    _long_frame,
)


def attack(port: int, rng: random.Random, cleanup: contextlib.ExitStack) -> None:
    """Open a connection and send what nobody should; it is closed, unread, with the stack."""
    with contextlib.suppress(OSError):  # the server may hang up
        connection = socket.create_connection(("127.0.0.1", port), timeout=_SEND_S)
        cleanup.callback(connection.close)
        connection.sendall(rng.choice(ATTACKS)(rng))
