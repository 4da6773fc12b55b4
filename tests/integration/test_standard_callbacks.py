"""Callbacks on the command line: a user's own ones, options of the standard ones, and what replaces them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.reporting.curves import read_scalars
from tests.support.refusal import Place, callback

OWN = """
from lightning.pytorch import Callback

class Own(Callback):
    def __init__(self, name: str = "own/groups"):
        self.name = name

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        batch.metrics[self.name] = float(len(batch.groups))
"""
FIT = ("fit", "--config", "run.yaml", "--trainer.max_steps=3")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dots_own_callback.py").write_text(OWN)
    return Place.at(tmp_path, monkeypatch, capsys)


def run(place: Place) -> Path:
    return place.path / "runs" / "small" / "version_0"


def saved(place: Place) -> list[str]:
    return sorted(path.name for path in (run(place) / "checkpoints").glob("step_*.ckpt"))


def test_own_callbacks_are_appended_and_their_metrics_logged(place: Place) -> None:
    more = {"trainer": {"callbacks+": [{"class_path": "dots_own_callback.Own"}]}}
    (place.path / "more.yaml").write_text(yaml.safe_dump(more))
    own = '--trainer.callbacks+={"class_path": "dots_own_callback.Own", "init_args": {"name": "own/again"}}'
    code, said = place.run(*FIT, "--config", "more.yaml", own)
    assert code == 0, said
    scalars = read_scalars(run(place))
    assert scalars["own/groups"] == scalars["own/again"] == ([0, 1, 2], [2.0, 2.0, 2.0])
    assert "replay/size" in scalars  # the listed callback is still there
    listed = yaml.safe_load((run(place) / "config.yaml").read_text())["trainer"]["callbacks"]
    assert [one["class_path"].rpartition(".")[2] for one in listed] == ["RolloutReplay", "RunCheckpoint", "Own", "Own"]


def test_options_of_standard_callbacks(place: Place) -> None:
    def change(config: dict) -> None:
        config["trainer"]["callbacks"] = []
        config["completions"] = {"every": 2}

    place.config(change)
    code, said = place.run(*FIT, "--checkpoint.every=2", "--checkpoint.keep=5")
    assert code == 0, said
    assert saved(place) == ["step_00000002.ckpt", "step_00000003.ckpt"]
    files = sorted(path.name for path in (run(place) / "completions").iterdir())
    assert files == ["step_00000000.parquet", "step_00000002.parquet"]


def test_a_listed_callback_replaces_the_standard_one(place: Place) -> None:
    place.config(lambda config: callback(config, "RunCheckpoint").update(every=1, keep=3))
    code, said = place.run(*FIT, "--checkpoint.every=2")
    assert code == 0, said
    assert saved(place) == [f"step_0000000{step}.ckpt" for step in (1, 2, 3)]


def test_lightnings_switch_turns_checkpoints_off(place: Place) -> None:
    place.config(lambda config: config["trainer"].update(callbacks=[], enable_checkpointing=False))
    code, said = place.run(*FIT)
    assert code == 0, said
    assert not (run(place) / "checkpoints").exists()
    assert (run(place) / "summary.json").exists()
