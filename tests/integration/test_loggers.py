"""Every logger gets what TensorBoard gets, and a run leaves the same files and metrics with any of them."""

from __future__ import annotations

import csv
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.reporting.curves import read_scalars
from tests.support.refusal import Place

pytestmark = pytest.mark.slow

FIT = ("fit", "--config", "run.yaml")
CLOCK = ("time/", "step_time", "tokens_per_second")
PICTURES = ("selection/reliability", "selection/forecast_scatter")
HISTOGRAMS = ("difficulty/measured_success", "difficulty/forecast_success")
OFFERED = 6  # of the 8 prompts, 2 are held out


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


def left(run: Path) -> list[str]:
    """Return the names of the files of a run, without those of its loggers."""
    names = (str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith(("events.", "hparams.yaml", "metrics.csv")))


def metrics(run: Path) -> dict[str, Any]:
    return {name: curve for name, curve in read_scalars(run).items() if not name.startswith(CLOCK)}


def same(run: Path, control: Path) -> None:
    assert left(run) == left(control)
    assert metrics(run) == metrics(control)
    lines = [(one / "histograms.jsonl").read_text() for one in (run, control)]
    assert lines[0] == lines[1]


def test_files_and_metrics_are_the_same_with_tensorboard_csv_and_none(place: Place) -> None:
    control = fitted(place, False)
    assert {"curves.png", "report.html", "prompts.parquet", "metrics.jsonl", "summary.json"} <= set(left(control))
    assert {"pictures/selection_reliability_00000001.png", "completions/val_00000002.parquet"} <= set(left(control))
    rows = [json.loads(line) for line in (control / "histograms.jsonl").read_text().splitlines()]
    assert [(row["step"], row["name"]) for row in rows] == [(step, name) for step in (0, 1) for name in HISTOGRAMS]
    assert [sum(row["counts"]) for row in rows] == [2, OFFERED, 1, OFFERED]  # a replayed group was not chosen again

    run = fitted(place, logger("CSVLogger", save_dir="rows", name="n"))
    same(run, control)
    with (run / "metrics.csv").open() as file:
        found = {name for row in csv.DictReader(file) for name, value in row.items() if value} - {"step"}
    assert found == set(read_scalars(control))
    assert yaml.safe_load((run / "hparams.yaml").read_text())["data/init_args/prompts_per_step"] == 2

    run = fitted(place, [logger("TensorBoardLogger", save_dir="tb", name="t", default_hp_metric=False)])
    same(run, control)
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == set(read_scalars(control))  # no point for the tab of hyperparameters
    assert tags["images"] == list(PICTURES) and tags["histograms"] == list(HISTOGRAMS)
    assert {"completions/val/text_summary", "completions/train/text_summary"} <= set(tags["tensors"])
    settings = yaml.safe_load((run / "hparams.yaml").read_text())
    assert settings["trainer/callbacks/0/init_args/capacity"] == 8 and settings["seed_everything"] == 0
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"model/init_args/sampling/num_generations" in plugin


def test_wandb_offline(place: Place) -> None:
    wandb = pytest.importorskip("wandb")
    control = fitted(place, False)
    run = fitted(place, logger("WandbLogger", save_dir="wb", project="p", offline=True))
    wandb.finish()
    same(run, control)
    files = next(Path("wb/wandb").glob("offline-run-*/files"))
    table = json.loads(next((files / "media/table/completions").glob("train_*.table.json")).read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    number = row["prompt"].partition(" ")[0]
    assert row["result"] == "wrong" and row["answer"] == str(int(number) + 1)
    pictures = {path.name.rsplit("_", 2)[0] for path in (files / "media/images/selection").iterdir()}
    assert pictures == {"reliability", "forecast_scatter"}
    recorded = next(files.parent.glob("run-*.wandb")).read_bytes()
    for name in (*HISTOGRAMS, "val/accuracy", "reward", "data/init_args/prompts_per_step"):
        assert name.encode() in recorded


@pytest.mark.parametrize("store", ["file:ml", "sqlite:///ml.db"])
def test_mlflow_in_a_local_store(place: Place, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    if store.startswith("sqlite") and not (find_spec("sqlalchemy") and find_spec("alembic")):
        pytest.skip("MLflow's database needs sqlalchemy and alembic")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for it
    control = fitted(place, False)
    place_of = logger("MLFlowLogger", tracking_uri=store, experiment_name="e", artifact_location=str(place.path / "a"))
    run = fitted(place, place_of)
    same(run, control)
    client = mlflow.MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("e").experiment_id])[0]
    assert set(found.data.metrics) == {name.replace("@", "") for name in read_scalars(control)}
    assert found.data.params["data/init_args/prompts_per_step"] == "2"
    artifacts = {str(path).partition("/artifacts/")[2] for path in Path("a").rglob("*.*")}
    assert {f"{name}/00000001.png" for name in PICTURES} | {f"{name}/00000001.json" for name in HISTOGRAMS} <= artifacts
    assert {"completions/train.json", "completions/val.json", "config.yaml"} <= artifacts
    table = json.loads(next(Path("a").rglob("val.json")).read_text())
    assert [row[table["columns"].index("step")] for row in table["data"]] == [0, 0, 1, 1, 2, 2]


def test_trackio(place: Place) -> None:
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    control, project = fitted(place, False), f"dots-test-{os.getpid()}"  # Trackio keeps its files in the user's cache
    run = fitted(place, logger("app.reporting.loggers.TrackioLogger", project=project, run_name="r", save_dir="tr"))
    try:
        same(run, control)
        logged = {name: row for row in SQLiteStorage.get_logs(project, "r") for name in row}
        assert set(read_scalars(control)) | set(PICTURES) | set(HISTOGRAMS) <= set(logged)
        assert logged["completions/train"]["completions/train"]["_value"][0]["result"] == "wrong"
        (found,) = trackio.Api().runs(project)
        assert found.config["data/init_args/prompts_per_step"] == 2
    finally:
        trackio.delete_project(project, force=True)


@pytest.mark.parametrize("kind", ["WandbLogger", "MLFlowLogger", "app.reporting.loggers.TrackioLogger"])
def test_a_missing_package_is_one_line(place: Place, kind: str) -> None:
    package = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}.get(kind, "trackio")
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    place.config(lambda config: config["trainer"].update(logger=logger(kind)))
    line = place.refused(*FIT)
    assert "pip install" in line and package in line


def test_a_logger_that_dots_does_not_know_gets_scalars_and_settings(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(place.path)
    (place.path / "dots_unknown_logger.py").write_text(
        """
import json
from lightning.pytorch.loggers import Logger

class Unknown(Logger):
    name = version = property(lambda self: "u")
    def log_metrics(self, metrics, step=None):
        self.write({"step": step, **metrics})
    def log_hyperparams(self, params, *rest):
        self.write({"settings": params})
    def write(self, row):
        with open("unknown.jsonl", "a") as file:
            file.write(json.dumps(row, default=float) + "\\n")
"""
    )
    fitted(place, logger("dots_unknown_logger.Unknown"))
    rows = [json.loads(line) for line in Path("unknown.jsonl").read_text().splitlines()]
    assert rows[0]["settings"]["data/init_args/prompts_per_step"] == 2
    assert [row["step"] for row in rows[1:]] == [0, 0, 0, 1, 1]  # validations at 0, 1 and 2 steps, and two steps


@pytest.mark.long
def test_a_resume_continues_the_record_with_any_logger(place: Place) -> None:
    control = fitted(place, False, "--trainer.max_steps=4")
    chosen = logger("CSVLogger", save_dir="rows", name="n")
    run = fitted(place, chosen, "--trainer.max_steps=3", "--checkpoint.every=2")
    # The third step is lost, and its lines too.
    for name in ("step_00000003.ckpt", "step_00000003.ckpt.sha256"):
        (run / "checkpoints" / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    fitted(place, chosen, "--trainer.max_steps=4", "--ckpt_path=last")
    assert {name: curve for name, curve in metrics(run).items() if name != "learning_rate"} == {
        name: curve for name, curve in metrics(control).items() if name != "learning_rate"
    }
    assert (run / "prompts.parquet").read_bytes() == (control / "prompts.parquet").read_bytes()
    assert (run / "histograms.jsonl").read_text() == (control / "histograms.jsonl").read_text()
