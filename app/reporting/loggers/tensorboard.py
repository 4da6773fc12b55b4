"""Media in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from app.reporting.loggers.base import Cell, Charts, Media, flat

_GOALS = ("val/accuracy", "reward")
"""Metrics of the HParams tab."""


class TensorBoardMedia(Media):
    """Text, Distributions, Images, Custom Scalars and HParams of TensorBoard."""

    logger: TensorBoardLogger

    def table(self, name: str, rows: Sequence[Mapping[str, Cell]], step: int) -> None:
        self.logger.experiment.add_text(name, "\n\n---\n\n".join(map(_markdown, rows)), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self.logger.experiment.add_histogram(name, values, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.logger.experiment.add_image(name, pixels, step, dataformats="HWC")

    def charts(self, charts: Charts) -> None:
        # TensorBoard matches the beginning of names: "reward" alone would show "reward_std" too.
        self.logger.experiment.add_custom_scalars(
            {
                category: {title: ["Multiline", [f"{name}$" for name in names]] for title, names in of.items()}
                for category, of in charts.items()
            }
        )

    def settings(self, config: Mapping[str, object]) -> None:
        # A resumed run may have other settings; the logger leaves a file that exists as it is.
        Path(self.logger.log_dir, self.logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        super().settings(config)
        # The logger writes them to its events only with values of metrics, which would be points of their curves.
        for summary in hparams(flat(config), dict.fromkeys(_GOALS, 0.0)):
            self.logger.experiment.file_writer.add_summary(summary)


def _markdown(row: Mapping[str, Cell]) -> str:
    """Return short cells as one line and long ones indented, because TensorBoard shows indented text verbatim."""
    texts = {name: _short(value) for name, value in row.items()}
    long = {name: text for name, text in texts.items() if name in ("prompt", "completion") or len(text) > 60}
    parts = [" · ".join(f"{name} {_escaped(text)}" for name, text in texts.items() if name not in long and text)]
    for name, text in long.items():
        parts.append(f"**{name}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    return "\n\n".join(parts)


def _short(value: Cell) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return "".join(f"\\{sign}" if sign in r"\`*_{}[]<>()#+-!|" else sign for sign in " ".join(text.split()))
