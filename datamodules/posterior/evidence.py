"""The model's constants, learnt from the run by empirical Bayes.

A log of all outcomes so far is replayed under other constants; those under which the outcomes were least surprising,
each predicted from the ones before it, are kept (prequential evidence: Dawid 1984, "Present position and potential
developments", equal to the marginal likelihood by the chain rule). Since every outcome is predicted given the whole
past, it does not matter that the past decided which prompts were tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.posterior.constants import Constants, log_hyperprior
from datamodules.posterior.model import PosteriorModel

REPLAYED = 2048
"""Outcomes replayed at most when constants are compared; the whole histories of some of the prompts."""
FACTORS = (2.0, 1.4)


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """Outcomes in the order in which they came; arrays `[N]`.

    Attributes:
        steps: int64: when.
        positions: int64: which prompt.
        successes: float64 summed rewards.
        samples: float64 completions.
    """

    steps: np.ndarray
    positions: np.ndarray
    successes: np.ndarray
    samples: np.ndarray

    @classmethod
    def empty(cls) -> Log:
        return cls(*(np.empty(0, dtype=kind) for kind in (np.int64, np.int64, np.float64, np.float64)))

    def __len__(self) -> int:
        return len(self.steps)

    def then(self, step: int, positions: np.ndarray, successes: np.ndarray, samples: np.ndarray) -> Log:
        """With one more batch."""
        new = (np.full(len(positions), step), positions, successes, samples)
        old = (self.steps, self.positions, self.successes, self.samples)
        return Log(*(np.concatenate(pair) for pair in zip(old, new, strict=True)))

    def of(self, rows: np.ndarray) -> Log:
        """Some of it, by a bool mask `[N]`."""
        return Log(self.steps[rows], self.positions[rows], self.successes[rows], self.samples[rows])

    def batches(self) -> Iterator[Log]:
        """Runs of outcomes of one step in which no prompt comes twice."""
        start, seen = 0, set[int]()
        for row in range(len(self)):
            position = int(self.positions[row])
            if row > start and (self.steps[row] != self.steps[start] or position in seen):
                yield self._slice(start, row)
                start, seen = row, set()
            seen.add(position)
        if len(self):
            yield self._slice(start, len(self))

    def _slice(self, start: int, stop: int) -> Log:
        part = slice(start, stop)
        return Log(self.steps[part], self.positions[part], self.successes[part], self.samples[part])


def replay(features: np.ndarray, constants: Constants, batches: Sequence[Log]) -> tuple[PosteriorModel, float]:
    """The model after a log's batches of outcomes, and the log-probability that it gave them on the way."""
    model, total = PosteriorModel(features, constants), 0.0
    for batch in batches:
        model.advance(int(batch.steps[0]) - model.step)
        total += model.observe(batch.positions, batch.successes, batch.samples)
    return model, total


def fit_constants(features: np.ndarray, start: Constants, log: Log) -> Constants:
    """Constants of more evidence than `start`, by one round of a pattern search over their logarithms.

    Each in turn is moved by a factor, up or down, as long as that helps. Later rounds go on from where this one ended,
    so that the constants settle as outcomes come in.

    Args:
        features: float32 `[Q, r]`.
        start: where the search begins.
        log: outcomes.
    """
    log = _some_histories(log)
    prompts, local = np.unique(log.positions, return_inverse=True)
    rows = np.asarray(features[prompts])
    batches = list(Log(log.steps, local.astype(np.int64), log.successes, log.samples).batches())

    def evidence(constants: Constants) -> float:
        return replay(rows, constants, batches)[1] + log_hyperprior(constants)

    best, best_value = start, evidence(start)
    for factor in FACTORS:
        for index in range(len(start.logarithms())):
            best, best_value = _move(best, best_value, index, np.log(factor), evidence)
    return best


def _move(
    best: Constants, value: float, index: int, step: float, evidence: Callable[[Constants], float]
) -> tuple[Constants, float]:
    """The best along one constant: as many steps as help, at most three, first upwards, else downwards."""
    for direction in (step, -step):
        moved = False
        for _ in range(3):
            shift = np.zeros(len(best.logarithms()))
            shift[index] = direction
            candidate = Constants.of(best.logarithms() + shift)
            candidate_value = evidence(candidate)
            if candidate_value <= value:
                break
            best, value, moved = candidate, candidate_value, True
        if moved:
            break
    return best, value


def _some_histories(log: Log) -> Log:
    """The whole histories of as many prompts as fit `REPLAYED`, spread evenly over the order of their first outcome."""
    if len(log) <= REPLAYED:
        return log
    prompts, first, counts = np.unique(log.positions, return_index=True, return_counts=True)
    by_age = np.argsort(first, kind="stable")
    # Multiples of the golden section are spread evenly, however many of them are taken.
    spread = by_age[np.argsort(np.arange(len(by_age)) * 0.6180339887498949 % 1.0, kind="stable")]
    kept = prompts[spread[np.cumsum(counts[spread]) <= REPLAYED]]
    return log.of(np.isin(log.positions, kept))
