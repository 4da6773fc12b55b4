"""Selection by what a group teaches: P(informative), and how far its gradient agrees with the others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.errors import UserError
from datamodules.selectors.alignment import Forecast, GradientMemory
from datamodules.selectors.base import NO_PROMPTS
from datamodules.selectors.posterior import MIN_CHANCE, Posterior
from datamodules.selectors.sampling import gumbel
from datamodules.types import GroupSketch

_MOST_CORRECTION = 4.0
"""A group counts at most so many times more or less in the mean gradient because its kind is chosen more often."""
_HALVINGS = 10


class Aligned(Posterior):
    """Draws prompts that are likely informative and whose gradients are likely to agree with those of the others.

    A prompt is drawn with probability ~ (P(informative) x alignment)^(1 / temperature), without replacement.
    P(informative) is that of `Posterior`. The alignment is the expected mean cosine of its group's gradient with those
    of the latest groups of other prompts (`GradientMemory`), as LearnAlign's score (arXiv 2506.11480) but measured
    during training: the gradients are sketches of the output head's, which fall off every update. It is forecast from
    the texts, and for prompts among the latest groups from their own gradients too. As long as measured alignments do
    not vary by more than their noise, all prompts are aligned alike and the draw is that of `Posterior`.

    Greedy alignment would keep to the most frequent kind of prompt. So it counts only as far as the draw still spreads
    over `variety` times as many prompts as by P(informative) alone; these are effective numbers, `(sum w)^2 / sum w^2`
    of the draw's weights `w`. A group of a kind that alignment favours counts less in the mean gradient.

    Args:
        predictor: folder of a trained attention predictor, whose query vectors replace the embeddings; null for the
            embeddings.
        encoder: folder or hub name of the text encoder, or several joined by `+`, chosen as by `Posterior`.
        use_embeddings: whether to use the texts; false tells prompts apart by their history only.
        learn_constants: whether the constants of `Posterior`'s model are fitted to the run.
        temperature: of the draw, above 0; smaller values keep closer to the best prompts.
        variety: the smallest spread of a draw, relative to one without alignment, in (0, 1]; 1 is `Posterior`.
        memory: number of the latest groups with a gradient that make up the mean gradient, at least 8.
    """

    uses_sketches = True

    def __init__(
        self,
        predictor: str | None = None,
        encoder: str | None = None,
        use_embeddings: bool = True,
        learn_constants: bool = True,
        temperature: float = 0.3,
        variety: float = 0.5,
        memory: int = 256,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise UserError(
                f"temperature is {temperature}, expected a finite number above 0: the best prompts alone would be of "
                "one kind. Use 0.3."
            )
        if not 0 < variety <= 1:
            raise UserError(f"variety is {variety}, expected a number in (0, 1]. Use 1 to choose without alignment.")
        if memory < 8:
            raise UserError(f"memory is {memory}, expected at least 8 groups. Raise it.")
        super().__init__(
            predictor=predictor, encoder=encoder, use_embeddings=use_embeddings, learn_constants=learn_constants,
            temperature=temperature,
        )  # fmt: skip
        self.variety, self.memory = variety, memory
        self._gradients = GradientMemory.empty()
        self._alignment: tuple[Forecast | None, np.ndarray] | None = None
        """The forecast, and the logarithm of its positive part relative to the mean, float64 `[Q]`."""
        self._drawn = 0.0, 0.0
        """Of the latest priorities: the exponent of the alignment, and the effective number of prompts."""
        self._strength, self._spread = self._drawn
        """The same of the latest choice."""

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        informative = self._placed().read(self._tabulated().informative)
        logits = np.log(np.maximum(informative, MIN_CHANCE)) / self.temperature
        advantage = self._aligned()[1] / self.temperature
        self._drawn = bounded(logits, advantage, self.variety)
        return gumbel(logits + self._drawn[0] * advantage, rng)

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NO_PROMPTS) -> None:
        super().settle(chosen, passed_over)
        self._strength, self._spread = self._drawn

    def observe_gradients(self, sketches: Sequence[GroupSketch]) -> None:
        used = [one for one in sketches if one.source != "replay" and one.vector.any()]
        if not used:
            return
        positions = self.pool.positions([one.prompt_id for one in used])
        vectors = np.stack([one.vector for one in used])
        forecast, advantage = self._aligned()
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        chosen_by = np.exp(self._strength * advantage[positions] / self.temperature)
        weights = 1 / np.clip(chosen_by, 1 / _MOST_CORRECTION, _MOST_CORRECTION)
        expected = np.full(len(positions), np.nan) if forecast is None else forecast.mean[positions]
        self._gradients = self._gradients.joined(GradientMemory(positions, units, weights, expected), self.memory)
        self._alignment = None

    def _aligned(self) -> tuple[Forecast | None, np.ndarray]:
        if self._alignment is None:
            forecast = self._gradients.forecast(self._features) if len(self._gradients) else None
            if forecast is None:
                self._alignment = None, np.zeros(len(self.pool))
            else:
                expected = forecast.positive_part()
                self._alignment = forecast, np.log(np.maximum(expected / expected.mean(), MIN_CHANCE))
        return self._alignment

    def metrics(self) -> dict[str, float]:
        forecast, _ = self._aligned()
        found = super().metrics() | {
            "selection/pool_share": self._spread / len(self.pool),
            "selection/alignment_strength": self._strength,
        }
        if forecast is not None:
            found["selection/alignment_mean"] = float(forecast.mean.mean())
            found["selection/alignment_std"] = float(forecast.mean.std())
        if np.isfinite(correlation := self._gradients.pearson()):
            found["selection/alignment_pearson"] = correlation
        return found

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "gradients": self._gradients.state_dict(),
            "strength": self._strength,
            "spread": self._spread,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._gradients = GradientMemory.restored(state["gradients"])
        self._strength, self._spread = state["strength"], state["spread"]
        self._alignment = None


def bounded(logits: np.ndarray, advantage: np.ndarray, variety: float) -> tuple[float, float]:
    """Return the largest exponent of the alignment, at most 1, that leaves enough variety, and the spread then.

    Args:
        logits: float64 `[Q]`, of the draw without alignment.
        advantage: float64 `[Q]`, added to them at an exponent of 1.
        variety: the smallest spread, relative to that without alignment.
    """
    alone = spread(logits)
    if not advantage.any():
        return 0.0, alone
    if (found := spread(logits + advantage)) >= variety * alone:
        return 1.0, found
    low, high, found = 0.0, 1.0, alone
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if (tried := spread(logits + middle * advantage)) >= variety * alone:
            low, found = middle, tried
        else:
            high = middle
    return low, found


def spread(logits: np.ndarray) -> float:
    """Return the effective number of prompts of a draw with these logits: `(sum w)^2 / sum w^2`."""
    weights = np.exp(logits - logits.max())
    return float(weights.sum() ** 2 / (weights @ weights))
