"""How many cases the property tests try: the same every time, or many times as many new ones (`make test-fuzz`)."""

from __future__ import annotations

import os

from hypothesis import settings

FACTOR = int(os.environ.get("DOTS_TEST_EXAMPLES") or 1)

# A test that fails by chance on a commit that has nothing to do with it tells its author nothing.
settings.register_profile("dots", derandomize=FACTOR == 1, deadline=None)
settings.load_profile("dots")


def examples(count: int) -> int:
    """`count`, times the factor asked for."""
    return count * FACTOR
