"""A logger for Trackio, and media in it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from app.reporting.loggers.base import Cell, Media
from datamodules.errors import UserError

if TYPE_CHECKING:
    from trackio import Run


class TrackioLogger(Logger):
    """Logs to Trackio, whose dashboard (`trackio show`) runs on this machine or in a Hugging Face Space.

    Args:
        project: project of the run.
        run_name: name of the run within it; null for one that Trackio makes up. A run of this name is continued.
        save_dir: parent of the run's own folder; Trackio keeps its files where TRACKIO_DIR says.
        space_id: Space to log to; null for this machine.

    Raises:
        UserError: trackio is not installed.
    """

    def __init__(
        self,
        project: str = "dots",
        run_name: str | None = None,
        save_dir: str = "runs",
        space_id: str | None = None,
    ) -> None:
        super().__init__()
        _trackio()
        self._project, self._run_name, self._save_dir, self._space_id = project, run_name, save_dir, space_id
        self._experiment: Run | None = None

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str | None:
        return self._run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """The run in Trackio, begun with the first access."""
        if self._experiment is None:
            self._experiment = _trackio().init(
                self._project, name=self._run_name, space_id=self._space_id, resume="allow", embed=False
            )
            self._run_name = self._experiment.name
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log({name: float(value) for name, value in metrics.items()}, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


class TrackioMedia(Media):
    """Tables, histograms and images of Trackio."""

    logger: TrackioLogger

    def table(self, name: str, rows: Sequence[Mapping[str, Cell]], step: int) -> None:
        self._log(name, _trackio().Table(dataframe=pd.DataFrame(list(rows))), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self._log(name, _trackio().Histogram(values), step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._log(name, _trackio().Image(pixels), step)

    def _log(self, name: str, value: object, step: int) -> None:
        self.logger.experiment.log({name: value}, step=step)


def _trackio() -> ModuleType:
    try:
        import trackio
    except ImportError as error:
        raise UserError(
            "TrackioLogger needs trackio, which is not installed. Run pip install trackio, or choose another logger."
        ) from error
    module: ModuleType = trackio
    return module
