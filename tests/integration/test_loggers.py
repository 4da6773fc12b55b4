"""Every logger gets what TensorBoard gets, and a run leaves the same files and metrics with any of them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.reporting.curves import read_scalars
from tests.support.refusal import Place

pytestmark = pytest.mark.slow

FIT = ("fit", "--config", "run.yaml")


def logger(kind: str, **arguments: Any) -> dict[str, Any]:
    path = kind if "." in kind else f"lightning.pytorch.loggers.{kind}"
    return {"class_path": path, "init_args": arguments}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


def fitted(place: Place, chosen: Any, *arguments: str) -> Path:
    """Return the folder of a run of two steps with these loggers, with pictures and validations."""

    def change(config: dict[str, Any]) -> None:
        config["trainer"] |= {"max_steps": 2, "logger": chosen}
        config["data"]["init_args"] |= {"val_size": 2, "selector": {"class_path": "datamodules.selectors.Mopps"}}
        config["selection_monitor"] = {"pictures_every": 2, "histograms_every": 1}

    place.config(change)
    code, out, said = place.run_with_output(*FIT, *arguments)
    assert code == 0, said
    return Path(next(line for line in out.splitlines() if line.startswith("run folder: ")).removeprefix("run folder: "))
