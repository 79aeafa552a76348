"""`distlock` with a part of its room for requests and replies: a test fills it soon."""

from __future__ import annotations

from distlock_server import limits

limits.MAX_REQUEST_BYTES = 64 << 20  # type: ignore[misc]  # final, but for this program
limits.MAX_UNREAD_BYTES = 64 << 20  # type: ignore[misc]

if __name__ == "__main__":
    from distlock_server.cli import main

    main()
