"""The state-space model: common drift, embedding part and own courses, updated by each batch of outcomes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from datamodules.posterior.observation import Sites, measure

INTERCEPT_VARIANCE = 4.0
"""Prior variance of the pool's mean log-odds: a success rate from 2% to 98%. One batch of outcomes outweighs it."""
CHUNK = 16384
MIN_VARIANCE = 1e-8
"""Lower bound of a belief's variance, which rounding can bring to zero after very many outcomes."""

_LOWEST = np.array([0.05, 1e-3, 5.0, 1e-4, 1e-6])
_HIGHEST = np.array([50.0, 50.0, 1e5, 4.0, 1.0])


@dataclass(frozen=True, slots=True)
class Constants:
    """The five constants that are fitted to a run, as variances of log-odds; a run starts from the defaults.

    Attributes:
        own: variance of a prompt's own course around the prediction from its embedding.
        shared: variance of the prediction from an embedding of unit length.
        memory: steps after which a prompt's own course has forgotten all but 1/e of its deviation.
        noise: variance of a group's own shift, on top of the binomial draw (over-dispersion).
        drift: variance of the common drift's step.
    """

    own: float = 4.0
    shared: float = 2.0
    memory: float = 300.0
    noise: float = 0.03
    drift: float = 1e-3

    def logarithms(self) -> np.ndarray:
        """Return the logarithms of the attributes in order, float64 `[5]`."""
        return np.log(np.array(list(asdict(self).values())))

    @classmethod
    def from_logarithms(cls, logarithms: np.ndarray) -> Constants:
        """Return the inverse of `logarithms`, clipped to wide bounds."""
        return cls(*np.clip(np.exp(logarithms), _LOWEST, _HIGHEST).tolist())


@dataclass(slots=True)
class Drift:
    """Belief over the common drift `m(t)`, a scalar Kalman filter.

    It starts at 0, since the pool's level is the intercept of the shared part.
    """

    mean: float = 0.0
    variance: float = 0.0

    def update(self, sites: Sites, mean: np.ndarray, variance: np.ndarray) -> None:
        """Condition on measurements `m + z_i + error`, where `z_i ~ N(mean_i, variance_i)`; arrays `[N]`.

        The `z_i` are treated as independent, so what prompts with similar embeddings have in common is counted once for
        each of them.
        """
        if self.variance <= 0:
            return
        weight = 1 / (variance + sites.variance)
        precision = 1 / self.variance + weight.sum()
        self.mean = float((self.mean / self.variance + weight @ (sites.value - mean)) / precision)
        self.variance = float(1 / precision)


@dataclass(frozen=True, slots=True, eq=False)
class Conditional:
    """Own courses given the embedding part: `z_i | g_i ~ N(level_i + pull_i g_i, spread_i)`; arrays `[N]`."""

    level: np.ndarray
    pull: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """Likelihood of g under new measurements: the factor `exp(shift_i g_i - precision_i g_i^2 / 2)`; arrays `[N]`."""

    precision: np.ndarray
    shift: np.ndarray


class History:
    """The own courses of a pool: one Ornstein-Uhlenbeck process per prompt, filtered given its embedding part g.

    Given g, the course z has mean g, stationary variance `own` and autocorrelation `exp(-gap / memory)`. Kalman's
    recursion is linear in g, so one pass keeps `z | g` for every g (`Conditional`). The information of an outcome about
    g is a Gaussian factor for the shared part (`Message`). Both are exact for Gaussian measurements.
    """

    def __init__(self, size: int, constants: Constants) -> None:
        self.constants = constants
        self.level = np.zeros(size)
        self.pull = np.ones(size)
        self.spread = np.full(size, constants.own)
        self.last = np.full(size, -1.0)
        """float64 `[Q]`: time of the latest outcome in steps, -1 for none."""

    def now(self, step: float, positions: np.ndarray | slice = slice(None)) -> Conditional:
        """Return the courses at `step` given all outcomes so far."""
        gap = np.where(self.last[positions] < 0, 0, step - self.last[positions])
        kept = np.exp(-gap / self.constants.memory)
        return Conditional(
            kept * self.level[positions],
            kept * self.pull[positions] + (1 - kept),
            kept**2 * self.spread[positions] + (1 - kept**2) * self.constants.own,
        )

    def update(self, step: float, positions: np.ndarray, measured: np.ndarray, variance: np.ndarray) -> Message:
        """Condition on measurements of the courses at distinct `positions`, with error variances `variance`."""
        now = self.now(step, positions)
        total = now.spread + variance
        gain = now.spread / total
        surprise = measured - now.level
        self.level[positions] = now.level + gain * surprise
        self.pull[positions] = now.pull * (1 - gain)
        self.spread[positions] = now.spread * (1 - gain)
        self.last[positions] = step
        return Message(now.pull**2 / total, now.pull * surprise / total)


class Shared:
    """Posterior over the weights `w` `[r + 1]` of `g_i = w . [phi_i, 1]`, by Bayesian linear regression.

    It is the Gaussian process with kernel `shared phi_i . phi_j + INTERCEPT_VARIANCE` in weight space (Rasmussen &
    Williams 2006, "Gaussian processes for machine learning", section 2.1), so the cost grows with Q r^2, not with Q^2.

    Args:
        features: float32 `[Q, r]`, may be memory-mapped; `r` may be 0.
        variance: prior variance of every weight except the intercept, the last one.
        slope: prior mean of the weight of the last feature; that of the others is 0.
    """

    def __init__(self, features: np.ndarray, variance: float, slope: float = 0.0) -> None:
        self.features = features
        width = features.shape[1]
        precision = np.diag(np.append(np.full(width, 1 / variance), 1 / INTERCEPT_VARIANCE))
        shift = np.zeros(width + 1)
        if slope:
            shift[width - 1] = slope / variance
        self.restore(precision, shift)

    def restore(self, precision: np.ndarray, shift: np.ndarray) -> None:
        """Set the posterior from its natural parameters, float64 `[r + 1, r + 1]` and `[r + 1]`."""
        self.precision, self.shift = precision, shift
        # The whitening matrix times its transpose is the covariance.
        self._whitening = np.linalg.inv(np.linalg.cholesky(precision)).T
        self.weights = self._whitening @ (self._whitening.T @ shift)

    def update(self, positions: np.ndarray, message: Message) -> None:
        """Condition on the factors of the prompts at `positions`."""
        design = self._design(positions)
        self.restore(self.precision + (design.T * message.precision) @ design, self.shift + design.T @ message.shift)

    def moments(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and variance of `g` at the positions, float64 `[N]` each."""
        design = self._design(positions)
        return design @ self.weights, ((design @ self._whitening) ** 2).sum(axis=1)

    def all_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and variance of `g` at every position, float64 `[Q]`, computed in float32 chunks."""
        whitening, weights = self._whitening.astype(np.float32), self.weights.astype(np.float32)
        mean, variance = np.empty(len(self.features)), np.empty(len(self.features))
        for start in range(0, len(mean), CHUNK):
            rows = np.asarray(self.features[start : start + CHUNK], dtype=np.float32)
            mean[start : start + CHUNK] = rows @ weights[:-1] + weights[-1]
            white = rows @ whitening[:-1] + whitening[-1]
            variance[start : start + CHUNK] = np.einsum("qr,qr->q", white, white)
        return mean, variance

    def _design(self, positions: np.ndarray) -> np.ndarray:
        rows = np.asarray(self.features[positions], dtype=np.float64)
        return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class Beliefs:
    """Beliefs `N(mean, variance)` over the current log-odds of success, float64 `[Q]` each."""

    mean: np.ndarray
    variance: np.ndarray


class PosteriorModel:
    """Filters the log-odds `x_i(t) = m(t) + z_i(t)` of a pool (see the package docstring for the model).

    Exact for Gaussian measurements of x and known drift. It makes three approximations: a group enters as the Gaussian
    measurement that changes the belief's first two moments as the group does; the own courses are updated with the
    drift at its filtered mean; the outcomes of a batch are linearised at the beliefs before the batch.

    Args:
        features: float32 `[Q, r]` embeddings, centred and of about unit length.
        constants: constants of the model.
        slope: prior mean of the weight of the last feature (see `prior`), 0 for features about which nothing is known.
    """

    def __init__(self, features: np.ndarray, constants: Constants, slope: float = 0.0) -> None:
        self.constants = constants
        self.step = 0.0
        self.drift = Drift()
        self.history = History(len(features), constants)
        self.shared = Shared(features, constants.shared, slope)

    def advance(self, steps: float = 1.0) -> None:
        """Move on by a number of steps, or by a fraction of one where the policy moved less than in a usual step."""
        self.step += steps
        self.drift.variance += steps * self.constants.drift

    def observe(self, positions: np.ndarray, successes: np.ndarray, samples: np.ndarray) -> float:
        """Condition on the groups of the prompts at distinct `positions`, int64 `[N]`.

        `successes` are their summed rewards and `samples` their completions, float64 `[N]`. Returns the sum of the
        log-probabilities of the outcomes before the update, up to a constant.
        """
        own = self.history.now(self.step, positions)
        mean, variance = self.shared.moments(positions)
        mean, variance = own.level + own.pull * mean, own.spread + own.pull**2 * variance
        spread = np.maximum(variance + self.drift.variance, MIN_VARIANCE)
        sites = measure(self.drift.mean + mean, spread, self.constants.noise, successes, samples)
        self.drift.update(sites, mean, variance)
        message = self.history.update(self.step, positions, sites.value - self.drift.mean, sites.variance)
        self.shared.update(positions, message)
        return float(sites.log_evidence.sum())

    def beliefs(self) -> Beliefs:
        """Return the current beliefs of all prompts."""
        own = self.history.now(self.step)
        mean, variance = self.shared.all_moments()
        return Beliefs(
            self.drift.mean + own.level + own.pull * mean,
            np.maximum(own.spread + own.pull**2 * variance + self.drift.variance, MIN_VARIANCE),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the features, as tensors and plain values."""
        history, shared = self.history, self.shared
        arrays = {"level": history.level, "pull": history.pull, "spread": history.spread, "last": history.last}
        arrays |= {"precision": shared.precision, "shift": shared.shift}
        return {
            "constants": asdict(self.constants),
            "step": self.step,
            "drift": [self.drift.mean, self.drift.variance],
            "arrays": {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
        }

    @classmethod
    def restored(cls, features: np.ndarray, state: dict[str, Any]) -> PosteriorModel:
        """Return the model whose `state_dict` is `state`."""
        model = cls(features, Constants(**state["constants"]))
        model.step = state["step"]
        model.drift = Drift(*state["drift"])
        arrays = {name: tensor.numpy().copy() for name, tensor in state["arrays"].items()}
        model.history.level, model.history.pull = arrays["level"], arrays["pull"]
        model.history.spread, model.history.last = arrays["spread"], arrays["last"]
        model.shared.restore(arrays["precision"], arrays["shift"])
        return model
