"""DOTS: difficulty-targeted online data selection (Sun et al. 2025, arXiv 2506.05316, section 4)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from datamodules.difficulty.attention import AttentionPredictor, AttentionSpace
from datamodules.difficulty.calibration import BOUNDS, CalibrationHead, CalibrationName
from datamodules.difficulty.encoders import embed_with
from datamodules.difficulty.forecaster import FittedForecaster, Forecast, Space, fit_forecaster
from datamodules.difficulty.kernel import KernelSpace
from datamodules.errors import UserError, nearest
from datamodules.pool import PromptPool
from datamodules.selectors.base import NO_PROMPTS, Ranker, SelectionContext
from datamodules.selectors.sampling import gumbel
from datamodules.types import Outcomes

DrawRule = Literal["once", "every_step"]

log = logging.getLogger(__name__)


class Dots(Ranker):
    """Draws prompts with P(q) ~ exp(-|p_hat_q - alpha| / tau) without replacement.

    `p_hat` is predicted from the success rates of the latest reference set, by a trained attention predictor or else by
    a similarity kernel fitted on these references. Before the first reference set the choice is uniform. Beyond the
    paper, a prompt measured since then keeps its measured rate.

    The draw is exact at any tau. The authors' float32 softmax is 0 beyond 104 tau from the prompt nearest to alpha.

    Args:
        alpha: success rate to aim at, in [0, 1].
        tau: temperature of the draw in units of success rate, > 0; a small value draws the nearest prompts only.
        predictor: folder of a trained attention predictor; null for the untrained similarity kernel.
        encoder: folder or hub name of the text encoder (any Hugging Face model or a sentence-transformers folder);
            null for the predictor's encoder, else the policy's initial weights.
        calibration: group_logit_temperature, platt, temperature or none; null for the predictor's own head, or
            group_logit_temperature without a predictor. A head that the predictor was not trained with is fitted on the
            leave-one-out forecasts of the references.
        refit: whether to fit a least-squares line on the references afterwards (as in the authors' code, not in the
            paper).
        draw: "once" draws the order of the whole pool when a reference set is measured, and its steps take the prompts
            in this order: none comes twice before all have come (as published, where the prompts of these steps are
            also shuffled; here the first step gets those drawn first). "every_step" draws at every choice, with the
            rates measured since: at a small tau the nearest prompts come again in the next step.
        use_measured: whether reference prompts keep their measured rate.
        use_fresh: whether prompts rolled out for training since the latest reference set keep their measured rate.
        fallback: whether the untrained kernel takes the place of a trained predictor while it forecast the references
            of all sets so far better (each reference from the others of its set, by soft-label cross-entropy): a
            predictor of another domain may know less than the kernel. Not in the paper.
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
        draw: DrawRule = "every_step",
        use_measured: bool = True,
        use_fresh: bool = True,
        fallback: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha}, expected a success rate in [0, 1]. Use 0.5 for informative prompts.")
        if not tau > 0:
            raise UserError(f"tau is {tau}, expected a number > 0. Use 1e-3 for the prompts nearest to alpha.")
        if calibration is not None and calibration not in BOUNDS:
            raise UserError(f"calibration is {calibration!r}, expected a known head: {nearest(calibration, BOUNDS)}")
        if draw not in get_args(DrawRule):
            raise UserError(f"draw is {draw!r}, expected once or every_step: {nearest(str(draw), get_args(DrawRule))}")
        self.alpha, self.tau = alpha, tau
        self.predictor, self.encoder = predictor, encoder
        self.calibration, self.refit, self.draw = calibration, refit, draw
        self.use_measured, self.use_fresh = use_measured, use_fresh
        self.fallback = fallback
        self._space: Space | None = None
        self._kernel: Space | None = None
        self._head: CalibrationHead | None = None
        self._references = _Measured()
        self._fresh = _Measured()
        self._forecast: Forecast | None = None
        self._drawn: np.ndarray | None = None
        """float64 `[Q]`: the noisy logits of the draw for the latest reference set; None without one."""
        self._turns: np.ndarray
        """int64 `[Q]`: times that each prompt was chosen since then."""
        self._excess = 0.0  # the predictor's loss minus the kernel's over all reference sets, in nats

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._turns = np.zeros(len(pool), dtype=np.int64)
        trained = AttentionPredictor.load(Path(self.predictor).expanduser()) if self.predictor else None
        name = self.encoder or (trained and trained.config.encoder) or context.policy_path
        if name is None:
            raise UserError(
                "selectors.Dots got no text encoder, expected a model folder or hub name. Set data.selector.encoder."
            )
        embeddings, key = embed_with(name, pool.questions, context.cache_dir)
        if trained is None:
            self._space = KernelSpace(embeddings, key, context.cache_dir)
            return
        self._space = AttentionSpace(trained, embeddings, key, context.cache_dir)
        if self.fallback:
            self._kernel = KernelSpace(embeddings, key, context.cache_dir)
        if self.calibration in (None, trained.config.calibration):
            self._head = trained.head

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        if self._drawn is not None:
            return self._drawn - self._turns * (np.ptp(self._drawn) + 1)  # another turn comes after all first ones
        expected = self.forecast()
        return np.zeros(len(self.pool)) if expected is None else self._draw(expected, rng)

    def _draw(self, expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return gumbel(-np.abs(expected - self.alpha) / self.tau, rng)

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NO_PROMPTS) -> None:
        if self._drawn is not None:
            self._turns[chosen] += 1

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        if len(positions) == 0:
            return
        measured = _Measured(positions, np.clip(outcomes.success_rate, 0.0, 1.0))
        if outcomes.source == "reference":
            self._references, self._fresh, self._forecast = measured, _Measured(), None
            self._compare()
            expected = self.forecast()
            if self.draw == "once" and expected is not None:
                self._drawn, self._turns[:] = self._draw(expected, self.draw_generator()), 0
        elif outcomes.source == "fresh":
            self._fresh = self._fresh.updated(measured)

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
        """Return `forecast` without measured values, float64 `[Q]`; None before the first reference set."""
        return self._predicted().success_rate if len(self._references.positions) else None

    def _predicted(self) -> Forecast:
        """Return the forecast from the references, cached until they change: it costs a pass over the pool."""
        if self._forecast is None:
            self._forecast = self._fitted(trained=not self._falls_back).forecast()
        return self._forecast

    @property
    def _falls_back(self) -> bool:
        return self._kernel is not None and self._excess > 0

    def _fitted(self, trained: bool) -> FittedForecaster:
        """Fit to the references the predictor (without one, the kernel), or else the kernel that it falls back to."""
        space, head = (self._space, self._head) if trained else (self._kernel, None)
        if space is None:
            raise RuntimeError("Dots has no pool yet. Call setup() first.")
        method, known = self.calibration or "group_logit_temperature", self._references
        return fit_forecaster(space, known.positions, known.rates, head, method, self.refit)

    def _compare(self) -> None:
        """Add the latest references to what the kernel forecast better than the predictor, and say who takes over."""
        if self._kernel is None:
            return
        before = self._falls_back
        self._excess += self._fitted(trained=True).loss - self._fitted(trained=False).loss
        if self._falls_back != before:
            one, other = "the untrained kernel", "the trained predictor"
            better, worse = (one, other) if self._falls_back else (other, one)
            log.warning("selectors.Dots uses %s, which forecast the references better than %s.", better, worse)

    def metrics(self) -> dict[str, float]:
        expected = self.forecast()
        if expected is None:
            return {}
        prediction = self._predicted()
        values = {
            "difficulty/forecast_mean": float(expected.mean()),
            "difficulty/calibration_temperature": prediction.calibration.temperature,
            "difficulty/calibration_bias": prediction.calibration.bias,
        }
        if self._kernel is not None:
            values["difficulty/predictor_used"] = float(not self._falls_back)
        if self._falls_back or not self.predictor:
            values["difficulty/kernel_temperature"] = 1.0 / prediction.scale
        return values

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"references": self._references.state(), "fresh": self._fresh.state()}
        state["excess"] = self._excess
        if self._drawn is not None:
            state |= {"drawn": torch.from_numpy(self._drawn.copy()), "turns": torch.from_numpy(self._turns.copy())}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._references, self._fresh = (
            _Measured(saved["positions"].numpy(), saved["rates"].numpy())
            for saved in (state["references"], state["fresh"])
        )
        self._forecast = None
        if self.draw == "once" and "drawn" in state:
            self._drawn, self._turns = state["drawn"].numpy().copy(), state["turns"].numpy().copy()
        self._excess = state.get("excess", 0.0)  # absent from checkpoints of before the fallback


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """Success rates `[N]`, float64, at the pool positions `[N]`, int64; of equal positions the last one counts."""

    positions: np.ndarray = field(default_factory=lambda: NO_PROMPTS)
    rates: np.ndarray = field(default_factory=lambda: np.empty(0))

    def updated(self, later: _Measured) -> _Measured:
        kept = ~np.isin(self.positions, later.positions)
        return _Measured(
            np.concatenate([self.positions[kept], later.positions]), np.concatenate([self.rates[kept], later.rates])
        )

    def state(self) -> dict[str, torch.Tensor]:
        return {"positions": torch.from_numpy(self.positions.copy()), "rates": torch.from_numpy(self.rates.copy())}
