"""Media in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import MLFlowLogger

from app.reporting.loggers.base import Cell, Media, flat


class MLflowMedia(Media):
    """Artifacts of MLflow: tables, pictures, and histograms as JSON. The configuration is its parameters."""

    logger: MLFlowLogger

    def table(self, name: str, rows: Sequence[Mapping[str, Cell]], step: int) -> None:
        columns = {"step": [step] * len(rows)} | {one: [row[one] for row in rows] for one in rows[0]}
        self.logger.experiment.log_table(self._run, columns, f"{name}.json")

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        counts, edges = np.histogram(values, 20)
        content = {"step": step, "counts": counts.tolist(), "edges": edges.tolist()}
        self.logger.experiment.log_dict(self._run, content, f"{name}/{step:08d}.json")

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.logger.experiment.log_image(self._run, pixels, f"{name}/{step:08d}.png")

    def settings(self, config: Mapping[str, object]) -> None:
        # A parameter of a run can't change, but a run that is resumed by its id may have other settings.
        known = self.logger.experiment.get_run(self._run).data.params
        self.logger.log_hyperparams({name: value for name, value in flat(config).items() if name not in known})
        self.logger.experiment.log_dict(self._run, dict(config), "config.yaml")

    @property
    def _run(self) -> str:
        run = self.logger.run_id
        assert run is not None
        return run
