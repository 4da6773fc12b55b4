"""Selection by one posterior per prompt, from text similarity and the prompt's own history."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.difficulty.attention import AttentionPredictor, AttentionSpace
from datamodules.difficulty.encoders import STATISTICS, embed_with, encoder_parts
from datamodules.difficulty.kernel import KernelSpace
from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.posterior.acquisition import Acquisition
from datamodules.posterior.calibration import Calibration, design
from datamodules.posterior.evidence import Log, fit_constants, replay
from datamodules.posterior.model import Beliefs, Constants, PosteriorModel
from datamodules.posterior.prior import SLOPE, read_prior, with_prior
from datamodules.posterior.table import BeliefTable, Cells
from datamodules.selectors.base import NO_PROMPTS, Ranker, SelectionContext
from datamodules.selectors.sampling import gumbel, top_k
from datamodules.types import Outcomes

MAX_LOG = 16384
"""Outcomes from which the constants are learnt; later ones no longer change them."""
DEFAULT_GROUP = 8
"""Completions per group assumed before the first outcome."""
MIN_CHANCE = 1e-6
"""Lower bound of P(informative) in a draw: its logarithm stays finite."""
_REVIEWED = 1e9
"""Priority of a retired prompt whose review is due, above every other."""


class Posterior(Ranker):
    """Chooses the prompts that are most likely informative and those worth exploring.

    Every prompt has a Gaussian belief over its log-odds of success under the current policy, made of the common drift
    of an improving policy, the prediction from its embedding, and its own course, about which old outcomes say less and
    less (see `datamodules.posterior` for the model and its approximations). The forecast is the mean success rate under
    that belief; the choice maximises `datamodules.posterior.Acquisition`. The five constants of the model are refitted
    whenever the number of outcomes has doubled. Time passes with the size of the updates, their learning rate times
    their gradient norm relative to its mean so far (KGPS, arXiv 2607.27610), or by steps where none is reported.
    `informative_chance` is calibrated on the outcomes of the chosen prompts, which leaves their order as it is.
    Reference rollouts are not needed, but used if there are any.

    For training, set `temperature` above 0: the greedy choice maximises the share of informative prompts and therefore
    keeps to prompts that it knows.

    Args:
        predictor: folder of a trained attention predictor, whose query vectors replace the embeddings; null for the
            embeddings.
        encoder: folder or hub name of the text encoder, or several joined by `+`; null for the predictor's encoder,
            else the policy's initial weights. Without a predictor, text statistics are added; they are used alone if
            there is no encoder.
        use_embeddings: whether to use the texts; false tells prompts apart by their history only.
        forecast_value: worth of a forecast that knows the whole pool, as a share of a batch of informative groups per
            step, >= 0. Larger values improve the forecasts and choose slightly worse; 0 explores only what pays for
            itself.
        learn_constants: whether the model's constants are fitted to the run.
        temperature: 0 takes the prompts of highest priority. Above 0, prompts are drawn without replacement with
            probabilities ~ P(informative)^(1 / temperature), and `forecast_value` is ignored. At 1 and with sharp
            beliefs the batch is what dynamic sampling would keep: a uniform draw among informative prompts.
        prior: success rates of another model: the column of the training data that holds them, such as `pass_rate`, or
            a JSONL file of {"question": text, "pass_rate": rate}; prompts without one are told by their texts. Null for
            none.
        retire_at: expected success rate from which a measured prompt is no longer chosen, such as 0.9 (ScaleRL, arXiv
            2510.13786); null retires none.
        reviews: share of the choices that goes to retired prompts, those not measured for longest first. One that is
            expected to fail again returns.
    """

    def __init__(
        self,
        predictor: str | None = None,
        encoder: str | None = None,
        use_embeddings: bool = True,
        forecast_value: float = 0.39,
        learn_constants: bool = True,
        temperature: float = 0.0,
        prior: str | None = None,
        retire_at: float | None = None,
        reviews: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value, zero in (
            ("forecast_value", forecast_value, "explore only what pays for itself"),
            ("temperature", temperature, "take the best instead of drawing"),
        ):
            if not 0 <= value < float("inf"):
                raise UserError(f"{name} is {value}, expected a finite number >= 0. Use 0 to {zero}.")
        self.predictor, self.encoder, self.use_embeddings = predictor, encoder, use_embeddings
        self.acquisition = Acquisition(forecast_value)
        self.learn_constants, self.temperature = learn_constants, temperature
        if retire_at is not None and not 0 < retire_at <= 1:
            raise UserError(
                f"retire_at is {retire_at}, expected a success rate in (0, 1]. Use null to retire no prompt."
            )
        if not 0 <= reviews <= 1:
            raise UserError(f"reviews is {reviews}, expected a share of the choices in [0, 1]. Use 0 for no reviews.")
        self.retire_at, self.reviews = retire_at, reviews
        self.prior, self._slope = prior, 0.0 if prior is None else SLOPE
        self._features = np.zeros((0, 0), dtype=np.float32)
        """float32 `[Q, r]` centred unit vectors; `r` is 0 without embeddings."""
        self._model = PosteriorModel(self._features, Constants())
        self._log = Log.empty()
        self._fitted_at = 0
        self._group = DEFAULT_GROUP
        self._table: BeliefTable | None = None
        self._cells: Cells | None = None
        self._calibration = Calibration()
        self._updates = (0, 0.0)
        """Number and summed sizes of the updates reported so far."""
        self._moved = 1.0
        """How far the policy moved since the latest choice, in updates of mean size; 1 where no update is reported."""
        self._reviews_owed = 0.0
        """Reviews of retired prompts still due, as a fraction of one."""
        self._explored = (0, 0)
        """Prompts chosen in this step that the greedy choice would have left out, and all prompts chosen."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        rates = None if self.prior is None else read_prior(self.prior, pool)
        self._features = self._embed(pool, context)
        if rates is not None:
            self._features = with_prior(self._features, rates)
        self._model = PosteriorModel(self._features, Constants(), self._slope)

    def _embed(self, pool: PromptPool, context: SelectionContext) -> np.ndarray:
        trained = AttentionPredictor.load(Path(self.predictor).expanduser()) if self.predictor else None
        name = self.encoder or (trained and trained.config.encoder) or context.policy_path
        if not self.use_embeddings:
            return np.zeros((len(pool), 0), dtype=np.float32)
        if trained is None:
            if name is None:
                name = STATISTICS
            elif STATISTICS not in encoder_parts(name):
                name = f"{STATISTICS}+{name}"
        elif name is None:
            raise UserError(
                "selectors.Posterior got a predictor but no text encoder, expected the one it was trained with. "
                "Set data.selector.encoder."
            )
        embeddings, key = embed_with(name, pool.questions, context.cache_dir)
        if trained is not None:
            embeddings = AttentionSpace(trained, embeddings, key, context.cache_dir).queries
            key = f"{key}-{trained.fingerprint()}"
        return KernelSpace(embeddings, key, context.cache_dir).queries

    def begin_step(self) -> None:
        super().begin_step()
        self._model.advance(self._moved)
        self._moved = 0.0 if self._updates[0] else 1.0
        self._explored = (0, 0)
        self._cells = None

    def updated(self, size: float) -> None:
        if not math.isfinite(size):
            return  # a skipped update: the policy did not move
        count, total = self._updates
        self._updates = count + 1, total + size
        if count == 0:
            self._moved = 0.0
        if self._updates[1]:
            self._moved += size * (count + 1) / self._updates[1]

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        table, cells = self._tabulated(), self._placed()
        if self.temperature > 0:
            chance = np.maximum(cells.read(table.informative), MIN_CHANCE)
            found = gumbel(np.log(chance) / self.temperature, rng)
        else:
            found = self.acquisition.priorities(
                table, cells, self._untried_variance(), self._model.constants.memory, n, max(1, self._steps)
            )
        if self.retire_at is not None:
            retired = self._retired()
            found[retired] = -np.inf
            due = min(int(self._reviews_owed + self.reviews * n + 1e-9), len(retired))
            unseen = -self._model.history.last[retired].astype(np.float64)
            found[retired[top_k(unseen, due, rng)]] = _REVIEWED
        return found

    def _untried_variance(self) -> float:
        """Return the variance of the success rate of a prompt of which only the run's constants are known."""
        constants = self._model.constants
        mean = self._model.drift.mean + float(self._model.shared.weights[-1])
        variance = constants.own + (constants.shared if self._features.shape[1] else 0)
        untried = Cells.of(Beliefs(np.array([mean]), np.array([variance])))
        return float(untried.read(self._tabulated().rate_deviation)[0] ** 2)

    def _retired(self) -> np.ndarray:
        """Return the int64 positions of measured prompts whose success rate is expected to be at least `retire_at`."""
        if self.retire_at is None:
            return NO_PROMPTS
        return np.flatnonzero((self._model.history.last >= 0) & (self.forecast() >= self.retire_at))

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NO_PROMPTS) -> None:
        if not len(chosen):
            return
        informative = self._informative()
        threshold = np.partition(informative, len(informative) - len(chosen))[len(informative) - len(chosen)]
        explored, total = self._explored
        self._explored = (explored + int((informative[chosen] < threshold).sum()), total + len(chosen))
        if self.retire_at is not None:
            reviewed = int(np.isin(chosen, self._retired()).sum())
            self._reviews_owed = max(0.0, self._reviews_owed + self.reviews * len(chosen) - reviewed)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        if len(positions) == 0:
            return
        samples = np.asarray(outcomes.samples, dtype=np.float64)
        # A shaped correctness reward may leave [0, 1], a success rate must not.
        successes = np.clip(outcomes.success_rate, 0.0, 1.0) * samples
        unique, place = np.unique(positions, return_inverse=True)
        successes = np.bincount(place, successes).astype(np.float64)
        samples = np.bincount(place, samples).astype(np.float64)
        # A pilot has fewer completions than the groups that are chosen for.
        group = outcomes.group_size or int(outcomes.samples.max())
        if group != self._group:
            self._group, self._table = group, None
        if outcomes.source == "fresh":
            known = outcomes.samples >= group  # a smaller group does not tell whether one of this size is informative
            if known.any():
                informative = _informative_part(outcomes.success_rate[known], outcomes.samples[known], group)
                self._calibration.learn(self._cases(positions[known]), informative)
        self._model.observe(unique, successes, samples)
        self._cells = None
        if self.learn_constants and len(self._log) < MAX_LOG:
            self._log = self._log.extended(self._model.step, unique, successes, samples)
            if len(self._log) >= 2 * self._fitted_at:
                self._fit_constants()

    def _fit_constants(self) -> None:
        """Fit the constants to the log and, if they changed, filter the run again."""
        self._fitted_at = len(self._log)
        constants = fit_constants(self._features, self._model.constants, self._log, self._slope)
        if constants != self._model.constants:
            self._model = replay(self._features, constants, list(self._log.batches()), self._slope)[0]
            self._table = self._cells = None

    def forecast(self) -> np.ndarray:
        return self._placed().read(self._tabulated().rate)

    def forecast_deviation(self) -> np.ndarray:
        return self._placed().read(self._tabulated().rate_deviation)

    def informative_chance(self) -> np.ndarray:
        """Return the calibrated probability that a group of each prompt is informative now, float64 `[Q]`."""
        return self._calibration.apply(self._cases())

    def _cases(self, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return what P(informative) is calibrated by, float64 `[N, 4]`, of the prompts at the positions."""
        cells, last = self._placed()[positions], self._model.history.last[positions]
        rested = np.where(last < 0, 0.0, self._model.step - last)
        return design(cells.read(self._tabulated().informative), cells.mean, rested)

    def _informative(self) -> np.ndarray:
        """Return P(informative) as the model has it, float64 `[Q]`."""
        return self._placed().read(self._tabulated().informative)

    def _tabulated(self) -> BeliefTable:
        if self._table is None:
            self._table = BeliefTable(self._group, self._model.constants.noise)
        return self._table

    def _placed(self) -> Cells:
        """Return the beliefs' places in the table, cached until they change: it costs a pass over the pool."""
        if self._cells is None:
            self._cells = Cells.of(self._model.beliefs())
        return self._cells

    def metrics(self) -> dict[str, float]:
        constants, drift = self._model.constants, self._model.drift
        explored, total = self._explored
        return {
            "selection/posterior_mean": float(self.forecast().mean()),
            "selection/posterior_std_mean": float(self.forecast_deviation().mean()),
            "selection/exploration_fraction": explored / max(1, total),
            "selection/informative_calibration_error": self._calibration.error,
            "difficulty/drift": drift.mean,
            "difficulty/own_variance": constants.own,
            "difficulty/shared_variance": constants.shared,
            "difficulty/memory_steps": constants.memory,
            "difficulty/noise_variance": constants.noise,
            "difficulty/drift_variance": constants.drift,
        }

    def state_dict(self) -> dict[str, Any]:
        log = self._log
        return super().state_dict() | {
            "model": self._model.state_dict(),
            "log": [torch.from_numpy(a.copy()) for a in (log.steps, log.positions, log.successes, log.samples)],
            "fitted_at": self._fitted_at,
            "group": self._group,
            "explored": list(self._explored),
            "calibration": self._calibration.state_dict(),
            "reviews_owed": self._reviews_owed,
            "updates": list(self._updates),
            "moved": self._moved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        saved, now = len(state["model"]["arrays"]["shift"]) - 1, self._features.shape[1]
        if saved != now:
            raise UserError(
                f"Cannot resume: the checkpoint's selectors.Posterior knows {saved} features of each prompt, this run "
                f"has {now}. Resume with the same encoder, predictor, use_embeddings and prior, or start a new run."
            )
        self._model = PosteriorModel.restored(self._features, state["model"])
        self._log = Log(*(tensor.numpy().copy() for tensor in state["log"]))
        self._fitted_at, self._group = state["fitted_at"], state["group"]
        self._explored = (state["explored"][0], state["explored"][1])
        self._calibration.load_state_dict(state["calibration"])
        self._reviews_owed, self._moved = state["reviews_owed"], state["moved"]
        self._updates = (state["updates"][0], state["updates"][1])
        self._table = self._cells = None


def _informative_part(rates: np.ndarray, samples: np.ndarray, group: int) -> np.ndarray:
    """Return the probability that `group` of each prompt's `samples`, drawn without replacement, differ, `[N]`."""
    right = np.rint(np.clip(rates, 0, 1) * samples)
    drawn = np.arange(group)
    alike = [
        np.prod(np.maximum(one[:, None] - drawn, 0) / np.maximum(samples[:, None] - drawn, 1), axis=1)
        for one in (right, samples - right)
    ]
    return 1 - np.sum(alike, axis=0)
