"""Fixtures of load tests: those of fault tests."""

from __future__ import annotations

from tests.faults.conftest import seed, shim

__all__ = ["seed", "shim"]
