"""Selection by one posterior per prompt, from text similarity and the prompt's own history."""

from __future__ import annotations

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
from datamodules.posterior.evidence import Log, fit_constants, replay
from datamodules.posterior.model import Beliefs, Constants, PosteriorModel
from datamodules.posterior.table import BeliefTable, Cells
from datamodules.selectors.base import NO_PROMPTS, Ranker, SelectionContext
from datamodules.selectors.sampling import gumbel
from datamodules.types import Outcomes

MAX_LOG = 16384
"""Outcomes from which the constants are learnt; later ones no longer change them."""
DEFAULT_GROUP = 8
"""Completions per group assumed before the first outcome."""
MIN_CHANCE = 1e-6
"""Lower bound of P(informative) in a draw: its logarithm stays finite."""


class Posterior(Ranker):
    """Chooses the prompts that are most likely informative and those worth exploring.

    Every prompt has a Gaussian belief over its log-odds of success under the current policy, made of the common drift
    of an improving policy, the prediction from its embedding, and its own course, about which old outcomes say less and
    less (see `datamodules.posterior` for the model and its approximations). The forecast is the mean success rate under
    that belief; the choice maximises `datamodules.posterior.Acquisition`. The five constants of the model are refitted
    whenever the number of outcomes has doubled. Reference rollouts are not needed, but used if there are any.

    For training, set `temperature` above 0: the greedy choice maximises the share of informative prompts and therefore
    keeps to prompts that it knows.

    Args:
        predictor: folder of a trained attention predictor, whose query vectors replace the embeddings; null for the
            embeddings.
        encoder: folder or hub name of the text encoder, or several joined by `+`; null for the predictor's encoder,
            else the policy's initial weights. Without a predictor, text statistics are added; they are used alone if
            there is no encoder.
        use_embeddings: whether to use the texts; false tells prompts apart by their history only.
        lookahead: steps for which a prompt found to be informative is expected to be used, >= 0.
        knowledge: value of knowing the whole pool, in batches of informative prompts at the first step, >= 0. Larger
            values improve the forecasts and choose slightly worse; 0 explores only what pays for itself.
        learn_constants: whether the model's constants are fitted to the run.
        temperature: 0 takes the prompts of highest priority. Above 0, prompts are drawn without replacement with
            probabilities ~ P(informative)^(1 / temperature), and `lookahead` and `knowledge` are ignored. At 1 and with
            sharp beliefs the batch is what dynamic sampling would keep: a uniform draw among informative prompts.
    """

    def __init__(
        self,
        predictor: str | None = None,
        encoder: str | None = None,
        use_embeddings: bool = True,
        lookahead: float = 16.0,
        knowledge: float = 110.0,
        learn_constants: bool = True,
        temperature: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, zero in (
            ("lookahead", lookahead, "switch that term off"),
            ("knowledge", knowledge, "switch that term off"),
            ("temperature", temperature, "take the best instead of drawing"),
        ):
            if not 0 <= value < float("inf"):
                raise UserError(f"{name} is {value}, expected a finite number >= 0. Use 0 to {zero}.")
        self.predictor, self.encoder, self.use_embeddings = predictor, encoder, use_embeddings
        self.acquisition = Acquisition(lookahead, knowledge)
        self.learn_constants, self.temperature = learn_constants, temperature
        self._features = np.zeros((0, 0), dtype=np.float32)
        """float32 `[Q, r]` centred unit vectors; `r` is 0 without embeddings."""
        self._model = PosteriorModel(self._features, Constants())
        self._log = Log.empty()
        self._fitted_at = 0
        self._group = DEFAULT_GROUP
        self._table: BeliefTable | None = None
        self._cells: Cells | None = None
        self._explored = (0, 0)
        """Prompts chosen in this step that the greedy choice would have left out, and all prompts chosen."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._features = self._embed(pool, context)
        self._model = PosteriorModel(self._features, Constants())

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
        self._model.advance()
        self._explored = (0, 0)
        self._cells = None

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        table, cells, constants = self._tabulated(), self._placed(), self._model.constants
        if self.temperature > 0:
            informative = cells.read(table.informative)
            return gumbel(np.log(np.maximum(informative, MIN_CHANCE)) / self.temperature, rng)
        # A prompt without outcomes, about which only the run's constants are known.
        mean = self._model.drift.mean + float(self._model.shared.weights[-1])
        variance = constants.own + (constants.shared if self._features.shape[1] else 0)
        untried = Cells.of(Beliefs(np.array([mean]), np.array([variance])))
        prior_variance = float(untried.read(table.rate_deviation)[0] ** 2)
        return self.acquisition.priorities(table, cells, prior_variance, constants.memory, n, max(1, self._steps))

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NO_PROMPTS) -> None:
        informative = self._placed().read(self._tabulated().informative)
        if len(chosen):
            threshold = np.partition(informative, len(informative) - len(chosen))[len(informative) - len(chosen)]
            explored, total = self._explored
            self._explored = (explored + int((informative[chosen] < threshold).sum()), total + len(chosen))

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        if len(positions) == 0:
            return
        samples = np.asarray(outcomes.samples, dtype=np.float64)
        # A shaped correctness reward may leave [0, 1], a success rate must not.
        successes = np.clip(outcomes.success_rate, 0.0, 1.0) * samples
        unique, place = np.unique(positions, return_inverse=True)
        successes = np.bincount(place, successes).astype(np.float64)
        samples = np.bincount(place, samples).astype(np.float64)
        group = int(outcomes.samples.max())  # a pilot has fewer completions than the groups that are chosen for
        if group != self._group:
            self._group, self._table = group, None
        self._model.observe(unique, successes, samples)
        self._cells = None
        if self.learn_constants and len(self._log) < MAX_LOG:
            self._log = self._log.extended(self._steps, unique, successes, samples)
            if len(self._log) >= 2 * self._fitted_at:
                self._fit_constants()

    def _fit_constants(self) -> None:
        """Fit the constants to the log and, if they changed, filter the run again."""
        self._fitted_at = len(self._log)
        constants = fit_constants(self._features, self._model.constants, self._log)
        if constants != self._model.constants:
            self._model = replay(self._features, constants, list(self._log.batches()))[0]
            self._table = self._cells = None

    def forecast(self) -> np.ndarray:
        return self._placed().read(self._tabulated().rate)

    def forecast_deviation(self) -> np.ndarray:
        return self._placed().read(self._tabulated().rate_deviation)

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._model = PosteriorModel.restored(self._features, state["model"])
        self._log = Log(*(tensor.numpy().copy() for tensor in state["log"]))
        self._fitted_at, self._group = state["fitted_at"], state["group"]
        self._explored = (state["explored"][0], state["explored"][1])
        self._table = self._cells = None
