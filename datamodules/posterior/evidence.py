"""Fit of the model's constants to the run by empirical Bayes.

The log of all outcomes is replayed under candidate constants. Those that predict each outcome best from the ones before
it are kept: the prequential evidence (Dawid 1984, "Present position and potential developments"), which equals the
marginal likelihood by the chain rule. As every outcome is predicted given the whole past, it does not matter that the
past decided which prompts were tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.posterior.model import Constants, PosteriorModel

REPLAYED = 2048
"""Largest number of outcomes replayed to compare constants; whole histories of a sample of the prompts."""
FACTORS = (2.0, 1.4)
_PRIOR_SPREAD = np.array([1.0, 1.0, 1.5, 1.5, 1.5])
"""Standard deviations of the log-normal prior of the constants; a few dozen outcomes outweigh it."""


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """Outcomes in order of arrival; arrays `[N]`.

    Attributes:
        steps: float64 time of each outcome in steps of usual size.
        positions: int64 pool position of its prompt.
        successes: float64 summed rewards.
        samples: float64 completions.
    """

    steps: np.ndarray
    positions: np.ndarray
    successes: np.ndarray
    samples: np.ndarray

    @classmethod
    def empty(cls) -> Log:
        """Return a log without outcomes."""
        return cls(*(np.empty(0, dtype=kind) for kind in (np.float64, np.int64, np.float64, np.float64)))

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, rows: np.ndarray | slice) -> Log:
        return Log(self.steps[rows], self.positions[rows], self.successes[rows], self.samples[rows])

    def extended(self, step: float, positions: np.ndarray, successes: np.ndarray, samples: np.ndarray) -> Log:
        """Return the log with one more batch."""
        new = (np.full(len(positions), float(step)), positions, successes, samples)
        old = (self.steps, self.positions, self.successes, self.samples)
        return Log(*(np.concatenate(pair) for pair in zip(old, new, strict=True)))

    def batches(self) -> Iterator[Log]:
        """Yield consecutive outcomes of one time without repeated prompts."""
        start, seen = 0, set[int]()
        for row in range(len(self)):
            position = int(self.positions[row])
            if row > start and (self.steps[row] != self.steps[start] or position in seen):
                yield self[start:row]
                start, seen = row, set()
            seen.add(position)
        if len(self):
            yield self[start:]


def replay(
    features: np.ndarray, constants: Constants, batches: Sequence[Log], slope: float = 0.0
) -> tuple[PosteriorModel, float]:
    """Return the model after the batches of a log and the log-probability it gave them."""
    model, total = PosteriorModel(features, constants, slope), 0.0
    for batch in batches:
        model.advance(float(batch.steps[0]) - model.step)
        total += model.observe(batch.positions, batch.successes, batch.samples)
    return model, total


def fit_constants(features: np.ndarray, start: Constants, log: Log, slope: float = 0.0) -> Constants:
    """Return constants of higher evidence than `start`, by one round of pattern search over their logarithms.

    Each constant is multiplied or divided by a factor as long as that helps, at most three times. Later rounds start
    from the result of this one, so the constants settle as outcomes arrive. `features` are float32 `[Q, r]`.
    """
    log = sample_histories(log)
    prompts, local = np.unique(log.positions, return_inverse=True)
    rows = np.asarray(features[prompts])
    batches = list(Log(log.steps, local.astype(np.int64), log.successes, log.samples).batches())
    centre = Constants().logarithms()

    def evidence(constants: Constants) -> float:
        distance = (constants.logarithms() - centre) / _PRIOR_SPREAD
        return replay(rows, constants, batches, slope)[1] + float(-0.5 * distance @ distance)

    best, best_value = start, evidence(start)
    for factor in FACTORS:
        for index in range(len(centre)):
            for direction in (np.log(factor), -np.log(factor)):
                improved = False
                for _ in range(3):
                    shift = np.zeros(len(centre))
                    shift[index] = direction
                    candidate = Constants.from_logarithms(best.logarithms() + shift)
                    value = evidence(candidate)
                    if value <= best_value:
                        break
                    best, best_value, improved = candidate, value, True
                if improved:
                    break
    return best


def sample_histories(log: Log) -> Log:
    """Return whole histories of as many prompts as fit `REPLAYED`, spread evenly over the order of first outcomes."""
    if len(log) <= REPLAYED:
        return log
    prompts, first, counts = np.unique(log.positions, return_index=True, return_counts=True)
    by_age = np.argsort(first, kind="stable")
    # Any number of leading multiples of the golden section is spread evenly.
    spread = by_age[np.argsort(np.arange(len(by_age)) * 0.6180339887498949 % 1.0, kind="stable")]
    kept = prompts[spread[np.cumsum(counts[spread]) <= REPLAYED]]
    return log[np.isin(log.positions, kept)]
