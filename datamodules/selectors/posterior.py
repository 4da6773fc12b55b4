"""One posterior per prompt: text similarity for prompts never tried, history for those that were."""

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
from datamodules.posterior import Acquisition, Beliefs, BeliefTable, Constants, Log, PosteriorModel, fit_constants
from datamodules.posterior.evidence import replay
from datamodules.posterior.table import Cells
from datamodules.selectors.base import NOBODY, Ranker, SelectionContext
from datamodules.selectors.sampling import gumbel
from datamodules.types import Outcomes

LOGGED = 16384
"""Outcomes from which the constants are learnt; they stay as they are after so many."""
FIRST_GROUP = 8
"""Completions per group assumed before the first outcome."""
LEAST_CHANCE = 1e-6
"""Smallest P(informative) that a draw reckons with: its logarithm stays finite."""


class Posterior(Ranker):
    """Takes the prompts whose groups are most likely informative, and those worth knowing more about.

    Every prompt has a Gaussian belief over its log-odds of success under the policy now: the common drift of an
    improving policy, what its embedding says, and its own course, of which old outcomes tell less and less
    (`datamodules.posterior`, where the approximations are named too). The forecast is the mean success rate under that
    belief. The choice maximises `datamodules.posterior.Acquisition`. The five constants of the model are refitted to
    the run's outcomes whenever these have doubled. Reference rollouts are not needed, as it explores by itself; it
    learns from them where there are some.

    Two numbers are set by hand, and their defaults were chosen looking at the recorded run of 1209 questions.
    `lookahead` matters little there: 0 instead of 16 changes the share of informative prompts by less than 0.006 and
    the forecast's Pearson by less than 0.01 at 128 or 32 prompts per step. `knowledge` is a preference between two
    aims, which no run can settle: for 128 prompts per step 30, 60 and 110 give informative shares of 0.895, 0.901 and
    0.892 with Pearson 0.77, 0.81 and 0.844 (one seed; another moves these by 0.003). Under a cool-down of 3 steps the
    rotation makes it explore anyhow: from 0 to 110 the share stays within 0.766 and 0.771.

    In a training, set `temperature` (0.3 in `configs/arms/posterior.yaml`). The share of informative prompts, which the
    greedy choice maximises, is not all that training needs: where some prompts are known to be informative and others
    little known, it stays with the first. On the quickstart's pool, 8 prompts per step, 76 steps took 180 prompts
    (plain GRPO 608), and with a cool-down of 80 steps no legs were counted in any logged step: 28% of that pool.

    What it falls short of: where prompts improve at unlike rates one common drift is too much for those that are never
    solved and too little for easy ones (a prompt at 0 of 8 thirty visits ago is forecast at 0.13, and is at 0.07), so
    P(informative) is too high for prompts tried once, long ago. A network fitted in hindsight to all outcomes of all
    prompts over the same quantities still picks no better 128 prompts (0.968 against 0.968 informative, over the last
    32 visits), which is why no calibrating layer stands on top. Nor do boosted trees where a cool-down of 3 steps
    forces the choice down to the 512 best: 0.78 against 0.80 of the best rested 128 at the same moments. What is
    missing is mostly the price of looking: were every prompt once tried measured anew at every visit, for nothing, this
    selector would reach 0.90 with Pearson 0.89 (0.82 under that cool-down), and on the second half of the run, 22
    visits, at most 0.88 (0.75) with `knowledge` 0, 30 or 110, where it has 0.81 to 0.85 (0.70 to 0.71; one seed). Texts
    tell a question's success rate (the best of nine kernel ridge regressions, 5 folds: Pearson 0.45), but hardly
    whether it is informative (0.20).

    Args:
        predictor: folder of a trained attention predictor, whose query vectors then take the embeddings' place; null
            for the embeddings as they are.
        encoder: folder or hub name of the text encoder, or several joined by `+`; null for the one the predictor names,
            else the policy's initial weights. Without a predictor, counts of what stands in the text are joined to it;
            they serve alone where there is no encoder.
        use_embeddings: whether texts are looked at; false tells prompts apart by their history only.
        lookahead: steps over which a prompt found to be informative is expected to be used, >= 0.
        knowledge: batches of informative prompts that knowing the whole pool would be worth at the first step, >= 0;
            0 explores only what pays for itself. Larger values forecast the pool better and choose a little worse.
        learn_constants: whether the model's constants are fitted to the run.
        temperature: 0 takes the prompts of the highest priority. Above 0, prompts are drawn without replacement with
            probabilities ~ P(informative)^(1 / temperature), and the two terms above play no part. At 1 and with sharp
            beliefs the batch is what dynamic sampling would keep: a uniform draw among informative prompts.
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
            ("lookahead", lookahead, "switches that term off"),
            ("knowledge", knowledge, "switches that term off"),
            ("temperature", temperature, "takes the best instead of drawing"),
        ):
            if not 0 <= value < float("inf"):
                raise UserError(f"{name} is {value}, expected a finite number >= 0: 0 {zero}")
        self.predictor, self.encoder, self.use_embeddings = predictor, encoder, use_embeddings
        self.acquisition = Acquisition(lookahead, knowledge)
        self.learn_constants = learn_constants
        self.temperature = temperature
        self._features = np.zeros((0, 0), dtype=np.float32)
        self._model = PosteriorModel(self._features, Constants())
        self._log = Log.empty()
        self._fitted_at = 0
        self._group = FIRST_GROUP
        self._table: BeliefTable | None = None
        self._cells: Cells | None = None
        self._explored = (0, 0)

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        """Embeds the pool, or finds its embeddings in the cache. UserError for an unusable encoder or predictor."""
        super().setup(pool, context)
        self._features = self._embedded(pool, context)
        self._model = PosteriorModel(self._features, Constants())

    def _embedded(self, pool: PromptPool, context: SelectionContext) -> np.ndarray:
        """float32 `[Q, r]` centred unit vectors; `r` is 0 without embeddings."""
        trained = AttentionPredictor.load(Path(self.predictor).expanduser()) if self.predictor else None
        name = self.encoder or (trained and trained.config.encoder) or context.policy_path
        if not self.use_embeddings:
            return np.zeros((len(pool), 0), dtype=np.float32)
        if trained is None:
            name = _with_statistics(name)
        elif name is None:
            raise UserError("selectors.Posterior got a predictor but no text encoder: set `encoder`, the one it is for")
        embeddings, key = embed_with(name, pool.questions, context.cache_dir)
        if trained is not None:
            embeddings = AttentionSpace(trained, embeddings, key, context.cache_dir).queries
            key = f"{key}-{trained.fingerprint()}"
        return KernelSpace(embeddings, key, context.cache_dir).queries

    def begin_step(self) -> None:
        super().begin_step()
        self._model.advance(self._steps - self._model.step)
        self._explored = (0, 0)
        self._forget_beliefs()

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        memory, step = self._model.constants.memory, max(1, self._steps)
        if self.temperature > 0:
            informative = self.acquisition.greedy(self._tabulated(), self._placed())
            return gumbel(np.log(np.maximum(informative, LEAST_CHANCE)) / self.temperature, rng)
        return self.acquisition.priorities(self._tabulated(), self._placed(), self._prior_variance(), memory, n, step)

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NOBODY) -> None:
        """Counts those that greedy choice, with no exploration term, would have left out."""
        informative = self.acquisition.greedy(self._tabulated(), self._placed())
        if len(chosen):
            threshold = np.partition(informative, len(informative) - len(chosen))[len(informative) - len(chosen)]
            explored, total = self._explored
            self._explored = (explored + int((informative[chosen] < threshold).sum()), total + len(chosen))

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        if len(positions) == 0:
            return
        samples = np.asarray(outcomes.samples, dtype=np.float64)
        # A shaped correctness reward may leave [0, 1]; a success rate cannot.
        successes = np.clip(outcomes.success_rate, 0.0, 1.0) * samples
        unique, place = np.unique(positions, return_inverse=True)
        successes = np.bincount(place, successes).astype(np.float64)
        samples = np.bincount(place, samples).astype(np.float64)
        group = int(np.median(outcomes.samples))
        if group != self._group:
            self._group, self._table = group, None
        self._model.observe(unique, successes, samples)
        self._forget_beliefs()
        if self.learn_constants and len(self._log) < LOGGED:
            self._log = self._log.then(self._steps, unique, successes, samples)
            self._refit()

    def _refit(self) -> None:
        """Fits the constants whenever the outcomes have doubled, and filters the run again under them."""
        if len(self._log) < 2 * self._fitted_at:
            return
        self._fitted_at = len(self._log)
        constants = fit_constants(self._features, self._model.constants, self._log)
        if constants != self._model.constants:
            self._model = replay(self._features, constants, list(self._log.batches()))[0]
            self._table = None
            self._forget_beliefs()

    def forecast(self) -> np.ndarray:
        return self._placed().read(self._tabulated().rate)

    def forecast_deviation(self) -> np.ndarray:
        """float64 `[Q]`: standard deviation of every prompt's success rate."""
        return self._placed().read(self._tabulated().rate_deviation)

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
        self._table = None
        self._forget_beliefs()

    def _tabulated(self) -> BeliefTable:
        if self._table is None:
            self._table = BeliefTable(self._group, self._model.constants.noise)
        return self._table

    def _placed(self) -> Cells:
        """Where the pool's beliefs lie in the table; kept until they change, since it costs a pass over the pool."""
        if self._cells is None:
            self._cells = Cells.of(self._model.beliefs())
        return self._cells

    def _prior_variance(self) -> float:
        """Variance of the success rate of a prompt of which nothing is known but the run's constants."""
        constants, shared = self._model.constants, self._model.shared
        mean = self._model.drift.mean + float(shared.weights[-1])
        untried = Beliefs(
            np.array([mean]), np.array([constants.own + (constants.shared if self._features.shape[1] else 0)])
        )
        return float(Cells.of(untried).read(self._tabulated().rate_deviation)[0] ** 2)

    def _forget_beliefs(self) -> None:
        self._cells = None


def _with_statistics(encoder: str | None) -> str:
    """The encoder's name with the text statistics joined to it. On the recorded run they say more than any encoder."""
    if encoder is None:
        return STATISTICS
    return encoder if STATISTICS in encoder_parts(encoder) else f"{STATISTICS}+{encoder}"
