"""Open files: as many as the system allows, and enough of them kept for the database."""

from __future__ import annotations

import logging
import resource
from typing import Final

logger = logging.getLogger(__name__)

FILES_KEPT: Final = 1_200
"""Files that connections must leave: the database opens up to 1,000 tables, and values a few."""

FEW_FILES: Final = 4_096
"""With fewer than so many the server says how many connections that leaves."""

MAX_CONNECTIONS: Final = 100_000
"""More connections than this are not accepted, whatever the system allows."""


def raise_limit() -> None:
    """Allow this process as many open files as the system lets it, and say so if they are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS names a hard limit that it does not allow
        hard = soft
    if _finite(hard) < FEW_FILES:
        logger.warning(
            "the system allows this process %d open files (ulimit -n): at most %d connections",
            hard,
            max_connections(),
        )


def max_connections() -> int:
    """Tell how many connections may be open at once."""
    soft = _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return max(min(soft - FILES_KEPT, MAX_CONNECTIONS), soft // 4)


def _finite(limit: int) -> int:
    return MAX_CONNECTIONS + FILES_KEPT if limit == resource.RLIM_INFINITY else limit
