"""DOTS: difficulty-targeted online data selection (Sun et al. 2025, arXiv 2506.05316, section 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.difficulty.attention import AttentionPredictor, AttentionSpace
from datamodules.difficulty.calibration import BOUNDS, CalibrationName
from datamodules.difficulty.encoders import embed_with
from datamodules.difficulty.forecaster import Forecast, Space, predict
from datamodules.difficulty.heads import CalibrationHead
from datamodules.difficulty.kernel import KernelSpace
from datamodules.errors import UserError, nearest
from datamodules.pool import PromptPool
from datamodules.selectors.base import Ranker, SelectionContext
from datamodules.selectors.sampling import gumbel
from datamodules.types import Outcomes


class Dots(Ranker):
    """Draws prompts with P(q) ~ exp(-|p_hat_q - alpha| / tau) without replacement.

    `p_hat` comes from the measured success rates of the latest reference set: by a trained attention predictor, or,
    without one, by a similarity kernel fitted on the references at hand. Until a reference set has been measured the
    choice is uniform. Beyond the paper, a prompt measured since then keeps its measured rate instead of a forecast.

    Args:
        alpha: success rate aimed at, in [0, 1].
        tau: temperature of the draw in units of success rate, > 0; small draws only the nearest.
        predictor: folder of a trained attention predictor; null for the untrained similarity kernel.
        encoder: folder or hub name of the text encoder (any Hugging Face model, or a sentence-transformers folder);
            null for the one the predictor names, else the policy's initial weights.
        calibration: group_logit_temperature, platt, temperature or none; null for the predictor's own head, or
            group_logit_temperature without a predictor. One that the predictor was not trained with, and any without a
            predictor, is fitted on the references (leave-one-out).
        refit: whether a least-squares line fitted on the references follows (the authors' code does so, the paper
            does not).
        use_measured: whether reference prompts keep their measured rate.
        use_fresh: whether prompts rolled out for training since the latest reference set keep their measured rate.
    """

    uses_references = True

    def __init__(
        self,
        alpha: float = 0.5,
        tau: float = 1e-3,
        predictor: str | None = None,
        encoder: str | None = None,
        calibration: CalibrationName | None = None,
        refit: bool = False,
        use_measured: bool = True,
        use_fresh: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(
                f"alpha is {alpha}, expected a success rate in [0, 1]: 0.5 aims at the most informative prompts"
            )
        if not tau > 0:
            raise UserError(f"tau is {tau}, expected a number > 0: 1e-3 draws the prompts nearest to alpha")
        if calibration is not None and calibration not in BOUNDS:
            raise UserError(f"calibration is {calibration!r}, expected a known head: {nearest(calibration, BOUNDS)}")
        self.alpha, self.tau = alpha, tau
        self.predictor, self.encoder = predictor, encoder
        self.calibration, self.refit = calibration, refit
        self.use_measured, self.use_fresh = use_measured, use_fresh
        self._space: Space | None = None
        self._head: CalibrationHead | None = None
        self._references = _Measured()
        self._fresh = _Measured()
        self._forecast: Forecast | None = None

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        """Embeds the pool, or finds its embeddings in the cache. UserError for an unusable encoder or predictor."""
        super().setup(pool, context)
        trained = AttentionPredictor.load(Path(self.predictor).expanduser()) if self.predictor else None
        name = self.encoder or (trained and trained.config.encoder) or context.policy_path
        if name is None:
            raise UserError("selectors.Dots got no text encoder, expected a model folder or hub name: set `encoder`")
        embeddings, key = embed_with(name, pool.questions, context.cache_dir)
        if trained is None:
            self._space = KernelSpace(embeddings, key, context.cache_dir)
            return
        self._space = AttentionSpace(trained, embeddings, key, context.cache_dir)
        if self.calibration in (None, trained.config.calibration):
            self._head = trained.head

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        expected = self.forecast()
        if expected is None:
            return np.zeros(len(self.pool))
        return gumbel(-np.abs(expected - self.alpha) / self.tau, rng)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        if len(positions) == 0:
            return
        measured = _Measured(positions, np.clip(outcomes.success_rate, 0.0, 1.0))
        if outcomes.source == "reference":
            self._references, self._fresh, self._forecast = measured, _Measured(), None
        elif outcomes.source == "fresh":
            self._fresh = self._fresh.then(measured)

    def forecast(self) -> np.ndarray | None:
        if not len(self._references.positions):
            return None
        expected = self._predicted().success_rate.copy()
        if self.use_measured:
            expected[self._references.positions] = self._references.rates
        if self.use_fresh:
            expected[self._fresh.positions] = self._fresh.rates
        return expected

    def predicted(self) -> np.ndarray | None:
        """float64 `[Q]`: `forecast` without any measured value in it; None before any reference."""
        return self._predicted().success_rate if len(self._references.positions) else None

    def metrics(self) -> dict[str, float]:
        expected = self.forecast()
        if expected is None:
            return {}
        how = self._predicted()
        values = {
            "difficulty/forecast_mean": float(expected.mean()),
            "difficulty/calibration_temperature": how.calibration.temperature,
            "difficulty/calibration_bias": how.calibration.bias,
        }
        return values if self.predictor else values | {"difficulty/kernel_temperature": 1.0 / how.scale}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"references": self._references.state(), "fresh": self._fresh.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._references, self._fresh = _Measured.restored(state["references"]), _Measured.restored(state["fresh"])
        self._forecast = None

    def _predicted(self) -> Forecast:
        """The forecast from the references; kept until they change, since it costs a pass over the pool."""
        if self._space is None:
            raise RuntimeError("Dots is used before setup()")
        if self._forecast is None:
            method = self.calibration or "group_logit_temperature"
            references = self._references
            self._forecast = predict(
                self._space, references.positions, references.rates, self._head, method, self.refit
            )
        return self._forecast


class _Measured:
    """Success rates `[N]` of pool positions `[N]`; where a position comes twice the later one counts."""

    def __init__(self, positions: np.ndarray | None = None, rates: np.ndarray | None = None) -> None:
        self.positions = np.empty(0, dtype=np.int64) if positions is None else np.asarray(positions, dtype=np.int64)
        self.rates = np.empty(0) if rates is None else np.asarray(rates, dtype=np.float64)

    def then(self, later: _Measured) -> _Measured:
        kept = ~np.isin(self.positions, later.positions)
        return _Measured(
            np.concatenate([self.positions[kept], later.positions]), np.concatenate([self.rates[kept], later.rates])
        )

    def state(self) -> dict[str, torch.Tensor]:
        return {"positions": torch.from_numpy(self.positions.copy()), "rates": torch.from_numpy(self.rates.copy())}

    @classmethod
    def restored(cls, state: dict[str, torch.Tensor]) -> _Measured:
        return cls(state["positions"].numpy(), state["rates"].numpy())
