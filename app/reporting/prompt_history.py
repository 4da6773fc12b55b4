"""What every prompt of the pool has been through in a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from app.reporting.completions import cut, reference_answer, task_of
from datamodules.mixture import Mixture
from datamodules.pool import PromptPool
from datamodules.prompts.reading import reward_columns
from datamodules.selectors import Selector

_SHOWN_CHARACTERS = 500
_TASK_COLUMNS = ("data_source", "task", "metadata", "extra_info")


class PromptHistory:
    """Counts and success rates by position in the pool.

    Args:
        size: number of prompts, `Q`.

    Attributes:
        times_chosen: int32 `[Q]`: steps in which the selector chose the prompt.
        last_chosen: int32 `[Q]`: the last of them, -1 for none.
        times_measured: int32 `[Q]`: groups of scored completions, those of reference sets included.
        last_success: float32 `[Q]`: success rate of the last of them, NaN for none.
        total_success: float64 `[Q]`: sum of their success rates.
    """

    def __init__(self, size: int) -> None:
        self.times_chosen = np.zeros(size, dtype=np.int32)
        self.last_chosen = np.full(size, -1, dtype=np.int32)
        self.times_measured = np.zeros(size, dtype=np.int32)
        self.last_success = np.full(size, np.nan, dtype=np.float32)
        self.total_success = np.zeros(size)

    @property
    def mean_success(self) -> np.ndarray:
        """Mean success rate of every prompt, float64 `[Q]`, NaN where none was measured."""
        return np.where(self.times_measured > 0, self.total_success / np.maximum(self.times_measured, 1), np.nan)

    def choose(self, positions: np.ndarray, step: int) -> None:
        """Record the prompts at distinct positions as chosen in a step."""
        self.times_chosen[positions] += 1
        self.last_chosen[positions] = step

    def measure(self, positions: np.ndarray, success: np.ndarray) -> None:
        """Record success rates, float `[N]`, of the prompts at `positions`, int64 `[N]`, which may repeat."""
        np.add.at(self.times_measured, positions, 1)
        np.add.at(self.total_success, positions, success)
        self.last_success[positions] = success

    def table(self, pool: PromptPool, selector: Selector, golds: Sequence[str]) -> pa.Table:
        """Return a row for every prompt: what it is, what the selector expects of it, and what was measured.

        Args:
            pool: the prompts, whose texts are cut after some hundred characters.
            selector: the selector of the run.
            golds: columns from which the rewards read reference answers, before the usual ones.
        """
        columns = list(reward_columns(pool, [*golds, *_TASK_COLUMNS]))
        if isinstance(pool, Mixture):
            names = list(pool.parts)
            tasks: list[str | None] = [names[source] for source in pool.source_of]
        else:
            tasks = [task_of(each) for each in columns]
        forecast, deviation = selector.forecast(), selector.forecast_deviation()
        unknown = np.full(len(pool), np.nan)
        answers = (reference_answer(each, golds) for each in columns)
        return pa.table(
            {
                "index": np.arange(len(pool)),
                "prompt_id": list(pool.ids),
                "task": pa.array(tasks, pa.string()),
                "question": [cut(text, _SHOWN_CHARACTERS) for text in pool.questions],
                "answer": pa.array([one and cut(one, _SHOWN_CHARACTERS) for one in answers], pa.string()),
                "forecast": _nullable(unknown if forecast is None else forecast),
                "forecast_deviation": _nullable(unknown if deviation is None else deviation),
                "times_chosen": self.times_chosen,
                "last_chosen_step": pa.array(self.last_chosen, mask=self.last_chosen < 0),
                "times_measured": self.times_measured,
                "last_success": _nullable(self.last_success.astype(np.float64)),
                "mean_success": _nullable(self.mean_success),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        return {name: torch.from_numpy(values.copy()) for name, values in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, state[name].numpy().copy())


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
