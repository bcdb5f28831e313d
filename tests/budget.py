"""How many cases a property test draws: the same few in every test run, HMT_FUZZ_CASES new ones under `make fuzz`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FUZZ_CASES = int(os.environ.get("HMT_FUZZ_CASES", "0"))


def cases(in_ci: int, share: float) -> settings:
    """Settings for a property of one implementation, which gets this share of its operator's cases when fuzzing."""
    return settings(
        max_examples=max(1, round(FUZZ_CASES * share)) if FUZZ_CASES else in_ci,
        derandomize=not FUZZ_CASES,
        database=None,
        deadline=None,  # an interpreted kernel is slow
        suppress_health_check=list(HealthCheck),  # a fixture that serves all cases of a test is meant
        print_blob=True,
    )
