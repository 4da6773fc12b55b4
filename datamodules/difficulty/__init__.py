"""Forecasts of the current difficulty of every prompt in a pool."""

from datamodules.difficulty.attention import AttentionPredictor, AttentionSpace, PredictorConfig
from datamodules.difficulty.calibration import Calibration, CalibrationName, fit_calibration, refit_line
from datamodules.difficulty.embeddings import TextEncoder, embed_questions
from datamodules.difficulty.forecaster import Forecast, predict
from datamodules.difficulty.kernel import KernelSpace

__all__ = [
    "AttentionPredictor",
    "AttentionSpace",
    "Calibration",
    "CalibrationName",
    "Forecast",
    "KernelSpace",
    "PredictorConfig",
    "TextEncoder",
    "embed_questions",
    "fit_calibration",
    "predict",
    "refit_line",
]
