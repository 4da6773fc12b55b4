"""A run owns one folder whatever the loggers; `--ckpt_path last` has one rule; no run touches another's files."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger

from app.cli import DotsTrainer
from app.engines import Sampling
from app.module import GRPOModule, Policy
from app.rewards import Numeric
from app.runs.lightning_internals import logger_folder
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from tests.support.command import _fork, _kill, kill_when
from tests.support.refusal import TINY, Place, callback
from tests.support.tables import few

pytestmark = pytest.mark.slow

FIT = ("fit", "--config", "run.yaml")
LAST = ("--ckpt_path", "last")
HOSTED = '''
from lightning.pytorch.loggers import Logger

class Hosted(Logger):
    """Keeps its metrics elsewhere, as Weights & Biases does: a save_dir, a project as name, an id as version."""
    def __init__(self, save_dir: str, project: str = "project"):
        super().__init__()
        self._save_dir, self._project = save_dir, project
    save_dir = property(lambda self: self._save_dir)
    name = property(lambda self: self._project)
    version = property(lambda self: "a1b2c3")
    def log_metrics(self, metrics, step=None): pass
    def log_hyperparams(self, params, *rest): pass
'''


def logger(kind: str, **arguments: Any) -> dict[str, Any]:
    path = kind if "." in kind else f"lightning.pytorch.loggers.{kind}"
    return {"class_path": path, "init_args": arguments}


TENSORBOARD, ROWS = logger("TensorBoardLogger", save_dir="tb", name="t"), logger("CSVLogger", save_dir="rows", name="n")
LOGGERS: dict[str, tuple[dict[str, Any], str]] = {
    "csv": ({"logger": ROWS}, "rows/n/version_0"),
    "csv and tensorboard": ({"logger": [ROWS, TENSORBOARD]}, "rows/n/version_0"),
    "tensorboard and csv": ({"logger": [TENSORBOARD, ROWS]}, "tb/t/version_0"),
    "hosted": ({"logger": logger("dots_hosted.Hosted", save_dir="cloud")}, "cloud/project/version_0"),
    "hosted and csv": (
        {"logger": [logger("dots_hosted.Hosted", save_dir="cloud"), ROWS]}, "cloud/project/version_0"
    ),
    "none": ({"logger": False}, "lightning_logs/version_0"),
    "default, own root": ({"logger": True, "default_root_dir": "root"}, "root/lightning_logs/version_0"),
    "named version": ({"logger": logger("TensorBoardLogger", save_dir="tb", name="t", version="mine")}, "tb/t/mine"),
    "numbered version": ({"logger": logger("CSVLogger", save_dir="rows", name="n", version=7)}, "rows/n/version_7"),
    "no name": ({"logger": logger("TensorBoardLogger", save_dir="tb", name="")}, "tb/version_0"),
    "sub_dir": ({"logger": logger("TensorBoardLogger", save_dir="tb", name="t", sub_dir="events")}, "tb/t/version_0"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dots_hosted.py").write_text(HOSTED)
    return Place.at(tmp_path, monkeypatch, capsys)


def ran(place: Place, *arguments: str) -> str:
    """Return what a command that succeeded said."""
    place.capture.readouterr()
    from app.cli.dots import main

    main(list(arguments))
    captured = place.capture.readouterr()
    return captured.out + captured.err


def steps_of(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder."""
    return sorted(int(path.stem.partition("_")[2]) for path in folder.glob("step_*.ckpt"))


def runs_in(folder: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("run.json"))


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


# --- One folder, and `last` ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", few(LOGGERS, 1))
def test_a_run_and_its_resume_share_one_folder(place: Place, name: str) -> None:
    options, folder = LOGGERS[name]
    place.config(lambda config: config["trainer"].update(options, max_steps=2))
    run = place.path / folder
    first = ran(place, *FIT, *LAST)
    assert re.search("no run under .* yet, starting a new one", first)
    assert first.count("run folder: ") == 2 and re.search(rf"run folder: (.*/)?{folder}\n", first)
    said = ran(place, *FIT, *LAST, "--trainer.max_steps=3")
    assert re.search(rf"--ckpt_path last: (.*/)?{folder}, from (.*/)?{folder}/checkpoints/step_00000002.ckpt", said)
    assert "trainer.max_steps: 2 -> 3" in said
    assert runs_in(place.path) == [folder]
    left = {str(path.relative_to(place.path)) for path in place.path.rglob("*") if path.is_file()}
    own = {name for name in left if name.startswith(folder)}
    assert left - own == {"pool.jsonl", "run.yaml", "dots_hosted.py"}
    assert steps_of(run / "checkpoints") == [2, 3] and summary(run)["steps"] == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 3
    assert (run / "completions" / "step_00000000.parquet").exists()
    if "csv" in name:
        with (run / "metrics.csv").open() as rows:
            assert [row["step"] for row in csv.DictReader(rows)] == ["0", "1", "2"]
    if "tensorboard" in name:
        assert len(list(run.glob("events.out.*"))) == 2


WANDB = {
    "wandb/__init__.py": """import json
run = None
def init(**options):
    with open("wandb_runs.jsonl", "a") as file:
        file.write(json.dumps({"id": options["id"], "resume": options["resume"]}) + "\\n")
    return Run(options["id"])
class Run:
    summary = {}
    def __init__(self, id):
        self.id, self.name, self.config = id, "n", type("C", (dict,), {"update": lambda *a, **k: 0})()
    def log(self, *args, **options): pass
    def define_metric(self, *args, **options): pass
class Table:
    def __init__(self, *args, **options): pass
Histogram = Image = Table
""",
    "wandb/sdk/__init__.py": "",
    "wandb/sdk/lib.py": "class RunDisabled: pass",
    "wandb/wandb_run.py": "from wandb import Run",
}
"""What Lightning's logger uses of Weights & Biases, which is not installed: notes the id that a run is started with."""


@pytest.mark.long
def test_a_resume_goes_on_in_the_same_weights_and_biases_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in WANDB.items():
        (place.path / name).parent.mkdir(parents=True, exist_ok=True)
        (place.path / name).write_text(text)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    kept = logger("WandbLogger", save_dir="cloud", project="p")
    place.config(lambda config: config["trainer"].update(logger=kept))
    try:
        ran(place, *FIT)
        ran(place, *FIT, *LAST, "--trainer.max_steps=2")
        ran(place, *FIT)
        ran(place, *FIT, "--trainer.logger.id=mine")
    finally:
        for name in [one for one in sys.modules if one.partition(".")[0] == "wandb"]:
            del sys.modules[name]
    started = [json.loads(line) for line in (place.path / "wandb_runs.jsonl").read_text().splitlines()]
    ids = [one["id"] for one in started]
    assert ids[0] == ids[1] == json.loads((place.path / "cloud/p/version_0/run.json").read_text())["id"]
    assert ids[2] not in (None, ids[0]) and ids[3] == "mine"
    assert {one["resume"] for one in started} == {"allow"}


def test_an_mlflow_experiment_has_its_name_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    for name in ("mlflow", "mlflow.tracking"):  # not installed
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["mlflow.tracking"], "MlflowClient", lambda uri: None, raising=False)
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_only.rank", 1)
    made = MLFlowLogger("exact", tracking_uri="file:tracked")
    assert logger_folder(made) == ("tracked", "exact", None)


def test_a_failed_second_start_from_python_keeps_no_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one trainer: a start that fails in its first rollout, twice, and one that works."""
    module = GRPOModule(Policy(str(TINY)), [Numeric()], sampling=Sampling(2, 3))
    data = OnlinePromptDataModule(PromptFile("pool.jsonl"), prompts_per_step=2, val_size=0, cache_dir="cache")
    rows = CSVLogger("rows", name="n")
    trainer = DotsTrainer(accelerator="cpu", devices=1, max_steps=1, logger=rows, enable_progress_bar=False)
    right = module.engine.generate
    for _ in range(2):
        monkeypatch.setattr(module.engine, "generate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError) as error:
            trainer.fit(module, datamodule=data)
        assert not getattr(error.value, "__notes__", [])
        assert not (place.path / "rows").exists()
    monkeypatch.setattr(module.engine, "generate", right)
    trainer.fit(module, datamodule=data)
    assert runs_in(place.path) == ["rows/n/version_0"]
    assert (place.path / "rows/n/version_0/metrics.csv").exists()


@pytest.mark.long
def test_a_damaged_csv_row_is_no_reason_to_lose_the_others(place: Place) -> None:
    """A process that was killed while it took the rows back: the next one takes them from the other file."""
    place.config(lambda config: config["trainer"].update(logger=ROWS, max_steps=2))
    ran(place, *FIT)
    file = place.path / "rows/n/version_0/metrics.csv"
    shutil.copy(file, file.with_name(".metrics.csv.kept"))
    file.write_text(file.read_text()[:50])
    ran(place, *FIT, *LAST, "--trainer.max_steps=3")
    with file.open() as rows:
        assert [row["step"] for row in csv.DictReader(rows)] == ["0", "1", "2"]
    assert not file.with_name(".metrics.csv.kept").exists()


@pytest.mark.long
def test_last_is_the_run_whose_config_is_given(place: Place) -> None:
    ran(place, *FIT)
    ran(place, *FIT, "--seed_everything=1")
    own = place.path / "runs/small/version_0/config.yaml"
    before = [path.read_bytes() for path in (place.path / "runs/small/version_1").rglob("*.ckpt")]
    said = ran(place, "export", "--config", str(own), *LAST, "--out", "exported")
    assert re.search(r"--ckpt_path last: .*version_0, from .*version_0/checkpoints/step_00000001.ckpt", said)
    assert "version_1, from" in ran(place, "export", "--config", "run.yaml", *LAST, "--out", "other")
    weights = [(place.path / out / "model.safetensors").read_bytes() for out in ("exported", "other")]
    assert weights[0] == weights[1]  # nothing was learned in one step of equal rewards: the message tells them apart
    # Other commands read, and have folders of their own, which `last` passes over.
    said = ran(place, "validate", "--config", str(own), "--data.val_size=2", *LAST)
    assert "version_0, from" in said and "run folder: runs/small/version_2" in said
    said = ran(place, *FIT, *LAST, "--trainer.max_steps=2")
    assert "version_1, from" in said and "(passed over: version_2 (of dots validate))" in said
    said = ran(place, "fit", "--config", str(own), *LAST, "--trainer.max_steps=3")
    assert "version_0, from" in said and steps_of(own.parent / "checkpoints") == [2, 3]
    assert before and runs_in(place.path) == [f"runs/small/version_{number}" for number in range(3)]


@pytest.mark.long
def test_a_run_killed_before_its_first_checkpoint_starts_over(place: Place) -> None:
    place.config(lambda config: callback(config, "RunCheckpoint").update(every=50))
    run = place.path / "runs/small/version_0"
    endless = ("--trainer.max_steps=40000", "--ckpt_path", "last")
    kill_when(run / "completions/step_00000000.parquet", *FIT, *endless, cwd=place.path)
    said = ran(place, *FIT, *LAST)
    assert "runs/small/version_0 was stopped before its first checkpoint: starting it over" in said
    assert runs_in(place.path) == ["runs/small/version_0"] and steps_of(run / "checkpoints") == [1]
    # A newer run without a checkpoint: the older one is not touched.
    kill_when(place.path / "runs/small/version_1/completions/step_00000000.parquet", *FIT, endless[0], cwd=place.path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = ran(place, *FIT, *LAST)
    assert "runs/small/version_1 was stopped before its first checkpoint: starting it over" in said
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert steps_of(run.with_name("version_1") / "checkpoints") == [1]
    # One that ended in order, and whose checkpoints were deleted since, keeps what it left.
    shutil.rmtree(run.with_name("version_1") / "checkpoints")
    said = ran(place, *FIT, *LAST)
    assert "version_1 ended without a checkpoint: starting over as a new run" in said
    assert runs_in(place.path)[-1] == "runs/small/version_2"
    line = place.refused("validate", "--config", "runs/small/version_1/config.yaml", "--data.val_size=2", *LAST)
    assert "version_1 was stopped before its first checkpoint" in line
    assert line.endswith("Train one first, or name a file.")


@pytest.mark.long
def test_runs_of_earlier_versions_are_found(place: Place) -> None:
    """They have no run.json, and their config.yaml names the version that a resume gave them."""
    ran(place, *FIT)
    run = place.path / "runs/small/version_0"
    (run / "run.json").unlink()
    said = ran(place, *FIT, *LAST, "--trainer.max_steps=2")
    assert "version_0, from" in said and steps_of(run / "checkpoints") == [1, 2]
    (run / "run.json").write_text("{")  # cut by a full disk
    ran(place, *FIT, *LAST, "--trainer.max_steps=3")
    assert steps_of(run / "checkpoints") == [2, 3] and runs_in(place.path) == ["runs/small/version_0"]


@pytest.mark.long
def test_a_refused_run_leaves_nothing(place: Place) -> None:
    place.refused(*FIT, "--data.prompts_per_step=99")
    place.config(lambda config: config["trainer"].update(logger=False))
    place.refused(*FIT, "--data.prompts_per_step=99")
    ran(place, *FIT)
    (place.path / "lightning_logs/version_0/run.json").unlink()
    place.refused(*FIT, *LAST, "--data.prompts_per_step=99")


@pytest.mark.long
def test_last_in_python(place: Place) -> None:
    def trainer(steps: int) -> DotsTrainer:
        return DotsTrainer(max_steps=steps, accelerator="cpu", logger=CSVLogger("rows"), enable_progress_bar=False)

    def parts() -> tuple[GRPOModule, OnlinePromptDataModule]:
        module = GRPOModule(Policy(str(TINY)), [Numeric()], sampling=Sampling(2, max_completion_length=3))
        return module, OnlinePromptDataModule(PromptFile("pool.jsonl"), prompts_per_step=2)

    module, prompts = parts()
    first = trainer(1)
    first.fit(module, datamodule=prompts, ckpt_path="last")
    run = place.path / "rows/lightning_logs/version_0"
    assert steps_of(run / "checkpoints") == [1]
    first.validate(module, datamodule=prompts)  # in the folder of its run
    module, prompts = parts()
    trainer(2).fit(module, datamodule=prompts, ckpt_path="last")
    assert steps_of(run / "checkpoints") == [1, 2] and runs_in(place.path) == ["rows/lightning_logs/version_0"]


# --- Owners ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_processes_never_share_a_run(place: Place) -> None:
    place.config(lambda config: callback(config, "RunCheckpoint").update(every=2))
    running = _fork([*FIT, "--trainer.max_steps=40000"], place.path, None, Path(os.devnull), Path(os.devnull))
    first = place.path / "runs/small/version_0"
    try:
        deadline = time.monotonic() + 60
        while not (first / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        # Taken at once, before the first holds anything but its owner.
        line = place.refused(*FIT, *LAST, touches=True)
        assert "runs/small/version_0 belongs to a run that another process is writing to" in line
        line = place.refused(*FIT, "--trainer.logger.version=0", touches=True)
        assert "another process is writing to" in line
        assert "run folder: runs/small/version_1\n" in ran(place, *FIT, "--seed_everything=1")
        while not (first / "checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(running.pid or 0, signal.SIGSTOP)  # its checkpoints must stay while the next line reads them
        line = place.refused("fit", "--config", str(first / "config.yaml"), *LAST)
        assert "another process is writing to" in line
    finally:
        _kill(running)
    # Killed, it owns nothing.
    newest = steps_of(first / "checkpoints")[-1]
    said = ran(place, *FIT, *LAST, "--trainer.logger.version=0", f"--trainer.max_steps={newest + 1}")
    assert f"version_0, from runs/small/version_0/checkpoints/step_{newest:08d}.ckpt" in said


def test_a_file_system_without_locks_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(file: Any, operation: int) -> None:
        if str(getattr(file, "name", "")).endswith("run.json"):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(file, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match=r"file system of runs/small/version_0 has no locks \(No locks available\)"):
        ran(place, *FIT)
    assert steps_of(place.path / "runs/small/version_0/checkpoints") == [1]


def kept(config: dict[str, Any]) -> None:
    callback(config, "RunCheckpoint").update(dirpath="kept", every=1, keep=2)


@pytest.mark.long
def test_checkpoints_of_another_run_are_never_touched(place: Place) -> None:
    place.config(kept)
    ran(place, *FIT, "--trainer.max_steps=3")
    line = place.refused(*FIT)
    assert "kept has checkpoints of another run (step_00000003.ckpt)" in line and "dirpath" in line
    place.config(lambda config: (kept(config), config["trainer"].update(logger=False)))
    assert "kept has checkpoints of another run" in place.refused(*FIT)
    place.config(kept)
    # Where they are is remembered, also when the option has gone.
    said = ran(place, *FIT, *LAST, "--trainer.max_steps=4")
    assert re.search(r"version_0, from .*/kept/step_00000003.ckpt", said) and steps_of(place.path / "kept") == [3, 4]
    line = place.refused(*FIT, "--ckpt_path", "kept/step_00000003.ckpt", "--trainer.max_steps=4")
    assert "kept has step_00000004.ckpt, which is later than the checkpoint that is resumed" in line
    place.config(lambda config: callback(config, "RunCheckpoint").update(every=1))
    said = ran(place, *FIT, *LAST, "--trainer.max_steps=5")
    assert steps_of(place.path / "runs/small/version_0/checkpoints") == [5]
    # A version that is given by hand, and has a run.
    line = place.refused(*FIT, "--trainer.logger.version=0")
    assert "runs/small/version_0/checkpoints has checkpoints of another run (step_00000005.ckpt)" in line
    file = "runs/small/version_0/checkpoints/step_00000005.ckpt"
    said = ran(place, *FIT, "--ckpt_path", file, "--trainer.max_steps=6", "--trainer.logger.version=0")
    assert "run folder: runs/small/version_0\n" in said
    said = ran(place, *FIT, "--ckpt_path", file, "--trainer.max_steps=6")
    assert "run folder: runs/small/version_1\n" in said
    # Another run's checkpoint does not open the door to a folder.
    file = "runs/small/version_1/checkpoints/step_00000006.ckpt"
    line = place.refused(*FIT, "--ckpt_path", file, "--trainer.max_steps=7", "--trainer.logger.version=0")
    assert "runs/small/version_0/checkpoints has checkpoints of another run" in line


@pytest.mark.long
def test_two_callbacks_keep_checkpoints_independently(place: Place) -> None:
    def two(config: dict[str, Any]) -> None:
        callback(config, "RunCheckpoint").update(every=1, keep=1)
        rare = {"every": 2, "keep": 9, "dirpath": "milestones"}
        config["trainer"]["callbacks"].append({"class_path": "callbacks.RunCheckpoint", "init_args": rare})

    place.config(two)
    ran(place, *FIT, "--trainer.max_steps=4")
    usual = place.path / "runs/small/version_0/checkpoints"
    assert steps_of(usual) == [4] and steps_of(place.path / "milestones") == [2, 4]
    for folder in (usual, place.path / "milestones"):
        assert (folder / "last.ckpt").resolve().name == "step_00000004.ckpt"
    (usual / "step_00000004.ckpt").write_bytes(b"")
    said = ran(place, *FIT, *LAST, "--trainer.max_steps=6")
    assert re.search(r"from .*/milestones/step_00000004.ckpt", said)
    assert steps_of(usual) == [6] and steps_of(place.path / "milestones") == [2, 4, 6]
    place.config(lambda config: config["trainer"]["callbacks"].append({"class_path": "callbacks.RunCheckpoint"}))
    assert "Two callbacks.RunCheckpoint write to the folder of the run" in place.refused(*FIT)


@pytest.mark.long
def test_what_a_killed_write_left_is_removed(place: Place) -> None:
    ran(place, *FIT)
    ours, others = (place.path / "runs/small" / name / "checkpoints" for name in ("version_0", "version_1"))
    others.mkdir(parents=True)
    names = (".step_00000002.ckpt.tmp", ".step_00000001.ckpt.sha256.tmp", ".last.ckpt.tmp")
    for folder in (ours, others):
        for name in names:
            (folder / name).write_bytes(b"half")
        (folder / ".step_00000003.ckpt.tmp").mkdir()
        (folder / ".step_00000003.ckpt.tmp" / "shard").write_bytes(b"half")
    ran(place, *FIT, *LAST, "--trainer.max_steps=2")
    assert not list(ours.glob(".*")) and len(list(others.glob(".*"))) == 4


@pytest.mark.long
def test_the_default_root_is_the_working_folder(place: Place) -> None:
    place.config(lambda config: config["trainer"].update(logger=False))
    ran(place, *FIT)
    ran(place, "predict", "--config", "run.yaml", "--data.val_size=2", *LAST)
    assert (place.path / "lightning_logs/version_1/completions/predict.parquet").exists()
    assert not (place.path / "config.yaml").exists() and not (place.path / "checkpoints").exists()


def test_variables_in_the_folder_of_the_runs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOTS_TEST_RUNS", str(place.path / "elsewhere"))
    code, said = place.run(*FIT, "--trainer.logger.save_dir=${DOTS_TEST_RUNS}/deep")
    assert code == 0, said[-2000:]
    assert (place.path / "elsewhere/deep/small/version_0/summary.json").is_file()
    line = place.refused(*FIT, "--trainer.logger.save_dir=$DOTS_TEST_UNSET/deep")
    assert "names the variable $DOTS_TEST_UNSET, which is not set" in line
    assert "the home of a user who does not exist" in place.refused(*FIT, "--trainer.logger.save_dir=~nobody_here/runs")
