"""Media as files of the run's folder."""

from __future__ import annotations

import matplotlib.image
import numpy as np
from lightning.pytorch.loggers import CSVLogger

from app.reporting.loggers.base import Media
from app.runs.lightning_internals import take_csv_back
from app.runs.record import RunRecord


class FileMedia(Media):
    """Pictures as PNGs and histograms as lines of JSON. What tables show of the completions is in `completions/`."""

    logger: RunRecord

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        counts, edges = np.histogram(values, 20)
        self.logger.log_histogram(name, counts.tolist(), edges.tolist(), step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        file = self.logger.folder / "pictures" / f"{name.replace('/', '_')}_{step:08d}.png"
        file.parent.mkdir(exist_ok=True)
        matplotlib.image.imsave(file, pixels)

    def resume(self, steps: int) -> None:
        self.logger.keep(steps)


class CSVMedia(Media):
    """The rows of a CSVLogger, which deletes those of an earlier start. Pictures are in the folder in any case."""

    logger: CSVLogger

    def resume(self, steps: int) -> None:
        take_csv_back(self.logger, steps)
