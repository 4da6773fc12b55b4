"""Tables of cases of which `make test` runs a few and `make test-long` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], quick: int) -> list[Any]:
    """Return the cases as parameters; all but `quick` of them, evenly spaced, are marked long."""
    listed = list(cases)
    kept = {place * len(listed) // quick for place in range(quick)}
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if place in kept else pytest.mark.long)
        for place, case in enumerate(listed)
    ]
