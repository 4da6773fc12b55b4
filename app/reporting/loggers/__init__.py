"""One adapter per logger for what is not a scalar: tables, histograms, pictures, settings."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from app.reporting.loggers.base import Charts, Media, flat
from app.reporting.loggers.files import CSVMedia, FileMedia
from app.reporting.loggers.mlflow import MLflowMedia
from app.reporting.loggers.tensorboard import TensorBoardMedia
from app.reporting.loggers.trackio import TrackioLogger, TrackioMedia
from app.reporting.loggers.wandb import WandbMedia
from app.runs.record import RunRecord

__all__ = ["Charts", "Media", "TrackioLogger", "flat", "media_of"]

_MEDIA: dict[type[Logger], type[Media]] = {
    RunRecord: FileMedia,
    TensorBoardLogger: TensorBoardMedia,
    WandbLogger: WandbMedia,
    MLFlowLogger: MLflowMedia,
    TrackioLogger: TrackioMedia,
    CSVLogger: CSVMedia,
}


def media_of(trainer: Trainer) -> list[Media]:
    """Return an adapter for each of the trainer's loggers; none on ranks other than 0."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [next((of for kind, of in _MEDIA.items() if isinstance(one, kind)), Media)(one) for one in loggers]
