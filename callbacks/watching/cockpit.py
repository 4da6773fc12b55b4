"""The overview page of a run (Custom Scalars in TensorBoard): learning signal, cost and outcome."""

from __future__ import annotations

from app.reporting.loggers import Charts
from datamodules.ledger import STEP_PHASES

CHARTS: Charts = {
    "What teaches": {
        "Informative fraction of the groups": (
            "selection/informative_fraction",
            "selection/fresh_informative_fraction",
            "selection/uniform_informative_measured",
        ),
        "Forecast quality": ("difficulty/reference_pearson", "selection/forecast_pearson", "selection/forecast_brier"),
        "Replay age in steps": ("replay/age_mean", "replay/age_max"),
    },
    "What costs": {
        "Seconds of a step by phase": tuple(f"time/{phase}" for phase in STEP_PHASES),
        "Completion tokens per second": ("tokens_per_second",),
        "Training clock in seconds": ("time/training",),
    },
    "What comes out": {
        "Accuracy on held-out prompts": ("val/accuracy", "val/pass@[0-9]+"),
        "Reward": ("reward", "val/reward"),
        "Completion length in tokens": ("completions/mean_length", "val/completions/mean_length"),
    },
}
"""Charts by category, three in a row. A chart shows the metrics whose whole names match one of its regular
expressions; metrics that the run does not log are left out."""
