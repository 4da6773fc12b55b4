"""Pools without prompts, outcomes and saved states for tests of selectors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.pool import PromptPool
from datamodules.selectors import Dots, Dps, Greso, Mopps, Pools, SelectionContext, Selector, Uniform
from datamodules.types import Outcomes, Source

PLAIN: dict[str, Callable[[], Any]] = {
    "Uniform": Uniform,
    "Dots": lambda: Dots(tau=0.05),
    "Dots, one draw": lambda: Dots(tau=0.05, draw="once"),
    "Greso": lambda: Greso(step_size=0.05),
    "Mopps": lambda: Mopps(decay=0.9, candidates=3),
    "Mopps, threshold": lambda: Mopps(strategy="threshold", candidates=3),
    "Dps": Dps,
    "Dps, local": lambda: Dps(prior="local", start="wrong", entropy_weight=0.1),
    "Pools": Pools,
}
"""The published selectors without filters or exploration."""


class _Noting(Selector):
    """Notes what it observes, and the forecast before each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Outcomes] = []
        self.expected: list[np.ndarray | None] = []

    def observe(self, outcomes: Outcomes) -> None:
        self.seen.append(outcomes)
        forecast = self.forecast()
        self.expected.append(None if forecast is None else forecast.copy())
        super().observe(outcomes)


class NotingUniform(_Noting, Uniform):
    """Uniform choice."""


class NotingMopps(_Noting, Mopps):
    """Mopps."""


def pool_of(questions: Sequence[str]) -> PromptPool:
    return PromptPool([].__getitem__, [f"p{i}" for i in range(len(questions))], questions)


def ready(selector: Selector, size: int, seed: int = 7) -> Any:
    """Return the selector, set up on a pool of `size` prompts."""
    selector.setup(pool_of([str(i) for i in range(size)]), SelectionContext(seed))
    return selector


def random_embeddings(monkeypatch: pytest.MonkeyPatch, size: int, width: int) -> np.ndarray:
    """Replace the text encoder by random vectors and return them."""
    vectors = np.random.default_rng(0).normal(size=(size, width)).astype(np.float32)
    for selector in ("dots", "posterior"):
        monkeypatch.setattr(f"datamodules.selectors.{selector}.embed_with", lambda *_: (vectors, "key"))
    return vectors


def outcomes(
    positions: Iterable[int], rates: Sequence[float] | np.ndarray, source: Source = "fresh", step: int = 0
) -> Outcomes:
    return Outcomes(
        step,
        [f"p{i}" for i in positions],
        np.asarray(rates, float),
        np.full(len(rates), 8),
        source,
        np.zeros(len(rates)),
    )


def chosen(selector: Selector, n: int, **options: Any) -> np.ndarray:
    """Return the positions of the next choice."""
    return selector.pool.positions(selector.choose(n, **options))


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
