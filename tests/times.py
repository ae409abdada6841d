"""Limits on how long something may take: as promised when a test runs alone, four times that beside other tests."""

from __future__ import annotations

import os

# Beside other tests, on as many cores, a process starts and a picture decodes several times slower; what a promise
# of seconds is worth shows alone: `pytest -n 0 tests/faults`, or `make soak`.
SLACK = 4.0 if "PYTEST_XDIST_WORKER" in os.environ else 1.0


def soon(found_s: float, limit_s: float) -> bool:
    """Whether what took found_s kept to a limit in seconds that holds for a machine with nothing else to do."""
    return found_s < limit_s * SLACK
