"""The overview page of a run in TensorBoard (Custom Scalars): learning signal, cost and outcome."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from datamodules.ledger import STEP_PHASES

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
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
expressions."""


def lay_out(trainer: Trainer) -> None:
    """Write the layout to the run's TensorBoard events; charts leave out metrics that the run does not log."""
    # TensorBoard matches the beginning of names: "reward" alone would show "reward_std" too.
    layout = {
        category: {title: ["Multiline", [f"{name}$" for name in names]] for title, names in charts.items()}
        for category, charts in CHARTS.items()
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout)
