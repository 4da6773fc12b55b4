"""The device of these tests and their report.

By default they run on the CPU with toy sizes, as part of `make test`. `make test-gpu` sets `DOTS_TEST_DEVICE=cuda`:
the same tests on one GPU, with real sizes. Figures that a test measures are listed at the end, and written as JSON to
the file that `DOTS_TEST_REPORT` names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.gpu.shapes import DEVICE, on_gpu

_FIGURES = pytest.StashKey[dict[str, dict[str, object]]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture
def device() -> torch.device:
    if on_gpu() and not torch.cuda.is_available():
        pytest.fail("DOTS_TEST_DEVICE is cuda, but torch sees no GPU: check nvidia-smi and torch.version.cuda.")
    return torch.device(DEVICE)


class Measured:
    """Collects the figures of one test."""

    def __init__(self, figures: dict[str, object]) -> None:
        self.figures = figures

    def __call__(self, **figures: object) -> None:
        self.figures |= figures


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    every = request.config.stash.setdefault(_FIGURES, {})
    return Measured(every.setdefault(request.node.name, {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    every = config.stash.get(_FIGURES, {})
    if on_gpu():
        terminalreporter.section("figures of this GPU")
        for test, figures in every.items():
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
            terminalreporter.write_line(f"{test}: {shown}")
    if path := os.environ.get("DOTS_TEST_REPORT"):
        Path(path).write_text(json.dumps(every, indent=1, default=str))
