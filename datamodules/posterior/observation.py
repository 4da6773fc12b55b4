"""The binomial likelihood of a group of completions, combined with a Gaussian belief over the log-odds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

REACH = 8.0
"""Half-width of the integration grid in standard deviations of the belief."""
MIN_NODES, MAX_NODES = 41, 513
MIN_PRECISION = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Assimilated:
    """Beliefs over the log-odds after one group each; arrays `[N]`.

    `log_evidence` is the log of the mean of `p^k (1 - p)^(n - k)` under the prior belief.
    """

    mean: np.ndarray
    variance: np.ndarray
    log_evidence: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Sites:
    """Measured log-odds with Gaussian errors that change each belief as its group does; arrays `[N]`."""

    value: np.ndarray
    variance: np.ndarray
    log_evidence: np.ndarray


def assimilate(mean: np.ndarray, variance: np.ndarray, successes: np.ndarray, samples: np.ndarray) -> Assimilated:
    """Return the moments of `N(x; mean, variance) sigmoid(x)^k (1 - sigmoid(x))^(n - k)`, normalised.

    Keeping these two moments is assumed-density filtering (Minka 2001, "A family of algorithms for approximate Bayesian
    inference", section 3.3). For groups of 0/n or n/n it is far more accurate than Laplace's approximation. The
    integrals are sums over an even grid that resolves both factors.

    Args:
        mean: float64 `[N]` prior means of the log-odds.
        variance: float64 `[N]` prior variances, > 0.
        successes: float64 `[N]` summed rewards `k` in [0, n]; fractions are allowed.
        samples: float64 `[N]` completions `n`.
    """
    deviation = np.sqrt(variance)
    nodes = grid(float(deviation.max(initial=0.0)), float(np.max(samples, initial=1)))
    x = mean[:, None] + deviation[:, None] * nodes
    # log(1 + e^x), several times faster than np.logaddexp and exact enough for |x| < 700.
    softplus = np.log(1.0 + np.exp(x))
    log_weight = successes[:, None] * x - samples[:, None] * softplus - 0.5 * nodes**2
    top = log_weight.max(axis=1, keepdims=True)
    weight = np.exp(log_weight - top)
    total = weight.sum(axis=1)
    first = weight @ nodes / total
    second = weight @ nodes**2 / total - first**2
    log_evidence = top[:, 0] + np.log(total * (nodes[1] - nodes[0])) - 0.5 * np.log(2 * np.pi)
    return Assimilated(mean + deviation * first, variance * second, log_evidence)


def measure(mean: np.ndarray, variance: np.ndarray, noise: float, successes: np.ndarray, samples: np.ndarray) -> Sites:
    """Return the groups as Gaussian measurements of the log-odds (see `assimilate` for the arguments).

    `noise` is the variance of a group's own shift of the log-odds (over-dispersion of the binomial count), >= 0.
    """
    spread = variance + noise
    after = assimilate(mean, spread, successes, samples)
    # The likelihood is log-concave, so only rounding can make a group widen a belief.
    precision = np.maximum(1 / after.variance - 1 / spread, MIN_PRECISION)
    value = (after.mean / after.variance - mean / spread) / precision
    return Sites(value, 1 / precision + noise, after.log_evidence)


def grid(deviation: float, samples: float) -> np.ndarray:
    """Return standardised nodes with steps below the likelihood's least width, 2 / sqrt(n) at p = 1/2."""
    count = int(np.clip(np.ceil(1.2 * REACH * deviation * np.sqrt(samples)), MIN_NODES, MAX_NODES)) // 2 * 2 + 1
    return np.linspace(-REACH, REACH, count)
