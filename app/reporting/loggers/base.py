"""What a run logs besides scalars, for any logger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import Logger

Cell = str | float | bool | None
Charts = Mapping[str, Mapping[str, Sequence[str]]]
"""Regular expressions of metrics by category and title of a chart."""
Setting = str | int | float | bool


class Media:
    """Hands tables, histograms, pictures and settings to a logger.

    This base is for loggers that Dots does not know: they get the settings, as hyperparameters, and nothing else.

    Args:
        logger: one of the trainer's loggers.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def table(self, name: str, rows: Sequence[Mapping[str, Cell]], step: int) -> None:
        """Log rows with the same columns, at least one."""

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Log the distribution of float values `[N]`, `N >= 1`."""

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Log a picture, uint8 `[height, width, 3]`."""

    def charts(self, charts: Charts) -> None:
        """Lay out an overview page, where a logger has one that can be set."""

    def settings(self, config: Mapping[str, object]) -> None:
        """Log the run's configuration, as hyperparameters by path: `data/init_args/prompts_per_step`."""
        self.logger.log_hyperparams(flat(config))

    def resume(self, steps: int) -> None:
        """Drop what was logged of later steps than the first `steps`, where a logger would show it twice."""


def flat(value: object, path: str = "") -> dict[str, Setting]:
    """Return the leaves of nested mappings and lists of mappings by their paths: no nulls, other lists as JSON text."""
    if value is None:
        return {}
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        parts = (flat(inner, f"{path}/{name}" if path else str(name)) for name, inner in value.items())
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {path: value if isinstance(value, str | int | float | bool) else json.dumps(value, default=str)}
