"""Every logged scalar has a name, a unit and a meaning, and no entry is dead."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback

from app.objective.options import SurrogateOptions
from callbacks import (
    DynamicSampling,
    ReferenceRollouts,
    RolloutReplay,
    Rollouts,
    RunLedger,
    SelectionMonitor,
    WeightSync,
)
from callbacks.watching.cockpit import CHARTS
from datamodules.metric_names import METRIC_NAMES, markdown_table, metric_name
from datamodules.selectors import Aligned, Composed, Posterior, SelectionContext
from datamodules.types import GroupSketch
from tests.support.scripted_run import HALF, WRONG, scripted_run
from tests.support.selector_builders import PLAIN, outcomes, pool_of, random_embeddings

ELSEWHERE = {
    "completions/mean_terminated_length",
    "difficulty/predictor_used",  # with a trained predictor only
    "environment/failed",  # with an environment only
    "environment/turns",
    "time/environment",
    "tools/call_frequency",
    "tools/failure_frequency",
    "val/environment/failed",
    "val/environment/turns",
    "val/tools/call_frequency",
    "val/tools/failure_frequency",
    "epoch",
    "ranks/update_token_imbalance",
    "group_size/informative_forecast",  # with GroupSizes only
    "group_size/informative_if_equal",
    "group_size/max",
    "group_size/min",
    "pilot/completed_fraction",  # with Pilots only
    "pilot/saved_completions",
    "pilot/threshold",
    "time/pilots_dropped",
    "rollout_ahead/age_max",
    "rollout_ahead/age_mean",
    "rollout_ahead/aged_out",
    "rollout_ahead/continued_tokens",
    "rollout_ahead/in_flight",
    "rollout_ahead/waiting",
    "test/*",
    "time/rollout_overlapped",
    "train/*/chosen_fraction",
    "train/*/forecast_mean",
    "train/*/informative_fraction",
    "train/*/mean_success",
    "train/*/reward",
    "train/loss",
    "updates/dropout",
    "updates/reuse_z_score",
    "updates/reused",
    "val/*/*",
    "val/*=*/accuracy",
    "val/*=*/prompts",
    "val/accuracy_*",
    "val/maj@*",
    "val/maj@*_prompts",
    "val/informative_fraction",
}
"""Entries of runs whose completions end before the limit, with ranks, rollouts ahead, a test, adapters, reuse, several
sources or sets, or pretraining."""


class Validated(Callback):
    """Collects the names of all validation metrics."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_validation_end(self, trainer, pl_module) -> None:
        self.names |= trainer.callback_metrics.keys()


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of all scalars of short runs and of every selector."""
    with pytest.MonkeyPatch.context() as patch:
        random_embeddings(patch, 24, 4)
        tags: set[str] = set()
        others = (Posterior(), Aligned(), Composed(PLAIN["Dots"](), explore=0.5))
        for selector in (*(make() for make in PLAIN.values()), *others):
            selector.setup(pool_of([str(i) for i in range(24)]), SelectionContext(7, "encoder"))
            selector.observe(outcomes(range(8), [0.0, 0.25, 0.5, 1.0] * 2, "reference"))
            selector.choose(6)
            for step in range(5):  # gradients of two kinds
                vectors = np.eye(2, dtype=np.float32)[[0, 0, 0, 0, 0, 0, 0, 0, 0, 1]]
                selector.observe_gradients(
                    [GroupSketch(i, f"p{i}", "fresh", step, one) for i, one in enumerate(vectors)]
                )
            tags |= selector.metrics().keys()
        validated = Validated()
        sampling = (WeightSync(), ReferenceRollouts(size=8, every=1), Rollouts(), DynamicSampling())
        watching = (RolloutReplay(max_uses=9, share="auto"), SelectionMonitor(), RunLedger(), validated)
        run = scripted_run(
            tmp_path_factory.mktemp("logged"), patch, [HALF, WRONG] * 13, [*sampling, *watching],
            selector=PLAIN["Dots"](), steps=3, function="noted", val_size=2,
            surrogate=SurrogateOptions(beta=0.01, dual_clip=3.0),
        )  # fmt: skip
        return tags | validated.names | {name for step in run.steps for name in step.metrics}


def test_every_logged_scalar_is_listed(logged: set[str]) -> None:
    assert not [tag for tag in sorted(logged) if metric_name(tag) is None]


def test_no_entry_is_dead(logged: set[str]) -> None:
    assert {entry.name for entry in METRIC_NAMES} - {metric_name(tag).name for tag in logged} == ELSEWHERE


def test_charts_show_listed_scalars() -> None:
    shown = [re.sub(r"\[.*", "4", name) for charts in CHARTS.values() for names in charts.values() for name in names]
    assert all(metric_name(name) for name in shown)


def test_the_table_has_a_row_per_entry() -> None:
    rows = markdown_table().splitlines()[2:]
    assert len(rows) == len(METRIC_NAMES) == len({entry.name for entry in METRIC_NAMES})
    assert "| `step_time` | s | duration of the step |" in rows
    assert all(row.count("|") == 4 for row in rows)


def test_the_documentation_holds_the_table():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert markdown_table().strip() in text
