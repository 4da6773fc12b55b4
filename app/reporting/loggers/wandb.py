"""Media in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import WandbLogger

from app.reporting.loggers.base import Cell, Media


class WandbMedia(Media):
    """Tables, histograms and images of Weights & Biases, offline too. A workspace cannot be laid out from a run."""

    logger: WandbLogger

    def table(self, name: str, rows: Sequence[Mapping[str, Cell]], step: int) -> None:
        import wandb  # optional, as are the other loggers' packages

        self._log(name, wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows]), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        import wandb

        self._log(name, wandb.Histogram(values.tolist()), step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        import wandb

        self._log(name, wandb.Image(pixels), step)

    def _log(self, name: str, value: object, step: int) -> None:
        self.logger.experiment.log({name: value, "trainer/global_step": step})
