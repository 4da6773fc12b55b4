"""Whatever is wrong with a config or an option: one line, the dotted name, the nearest valid one, exit code 2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from app.cli.parsing import DotsArgumentParser, run_or_exit
from datamodules.errors import UserError

HERE = "tests.support.parsing_classes"
GOOD: dict[str, Any] = {
    "trainer": {"logger": False, "callbacks": [{"class_path": f"{HERE}.Replay", "init_args": {"delta": 0.2}}]},
    "model": {"class_path": f"{HERE}.Module", "init_args": {"lr": 0.1, "drawing": {"temperature": 0.5}}},
    "data": {
        "class_path": f"{HERE}.Data",
        "init_args": {"path": "x", "chooser": {"class_path": f"{HERE}.Aimed", "init_args": {"target": 0.4}}},
    },
}


class Seen(Trainer):
    """A trainer whose validation shows that everything before it went well."""

    def validate(self, *args: Any, **kwargs: Any) -> None:
        print("ran")


def command(args: list[str]) -> None:
    LightningCLI(
        LightningModule,
        LightningDataModule,
        trainer_class=Seen,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        parser_class=DotsArgumentParser,
        parser_kwargs={"prog": "dots"},
        args=args,
    )


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dots"])
    monkeypatch.setenv("DOTS_DEBUG", "0")


def written(folder: Path, change: Callable[[dict[str, Any]], object] = lambda config: None) -> str:
    config = copy.deepcopy(GOOD)
    change(config)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def error_line(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_or_exit(lambda: command(args))
    lines = [line for line in capsys.readouterr().err.splitlines() if "Seed set" not in line]
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("dots: error: ")
    return lines[0].removeprefix("dots: error: ")


def model(config: dict[str, Any]) -> dict[str, Any]:
    return config["model"]["init_args"]


def data(config: dict[str, Any]) -> dict[str, Any]:
    return config["data"]["init_args"]


def callback(config: dict[str, Any]) -> dict[str, Any]:
    return config["trainer"]["callbacks"][0]


IN_FILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "top-level key": (
        lambda c: c.update(modle={"class_path": "x"}),
        "modle: the configuration has no option 'modle', did you mean 'model'?",
    ),
    "top-level scalar": (
        lambda c: c.update(ckpt_pth="last"),
        "ckpt_pth: the configuration has no option 'ckpt_pth', did you mean 'ckpt_path'?",
    ),
    "trainer key": (
        lambda c: c["trainer"].update(max_step=3),
        "trainer.max_step: section trainer has no option 'max_step', did you mean 'max_steps'?",
    ),
    "key in init_args": (
        lambda c: model(c).update(lrr=1),
        f"model.lrr: {HERE}.Module has no option 'lrr', did you mean 'lr'?",
    ),
    "key two classes deep": (
        lambda c: data(c)["chooser"]["init_args"].update(taget=0.3),
        f"data.chooser.taget: {HERE}.Aimed has no option 'taget', did you mean 'target'?",
    ),
    "key of a dataclass": (
        lambda c: model(c)["drawing"].update(temprature=1),
        "model.drawing.temprature: Drawing has no option 'temprature', did you mean 'temperature'?",
    ),
    "key of a callback": (
        lambda c: callback(c)["init_args"].update(detla=1),
        f"trainer.callbacks[0].detla: {HERE}.Replay has no option 'detla', did you mean 'delta'?",
    ),
    "type": (lambda c: model(c).update(lr="fast"), "model.lr=fast: expected float"),
    "type, deep": (
        lambda c: data(c)["chooser"]["init_args"].update(target="half"),
        "data.chooser.target=half: expected float",
    ),
    "type in a dataclass": (
        lambda c: model(c)["drawing"].update(temperature="hot"),
        "model.drawing.temperature=hot: expected float",
    ),
    "type of a trainer option": (
        lambda c: c["trainer"].update(min_steps="few"),
        "trainer.min_steps=few: expected int or null",
    ),
    "optional type, deep": (
        lambda c: callback(c)["init_args"].update(capacity="many"),
        "trainer.callbacks[0].capacity=many: expected int or null",
    ),
    "literal": (
        lambda c: model(c).update(loss="grppo"),
        "model.loss=grppo: expected one of 'grpo', 'dapo', did you mean 'grpo'?",
    ),
    "literal, deep": (
        lambda c: data(c)["chooser"]["init_args"].update(mode="kernal"),
        "data.chooser.mode=kernal: expected one of 'kernel', 'trained', did you mean 'kernel'?",
    ),
    "class": (
        lambda c: data(c)["chooser"].update(class_path=f"{HERE}.Aimd"),
        f"data.chooser: class_path {HERE}.Aimd: {HERE} has no 'Aimd', did you mean '{HERE}.Aimed'?",
    ),
    "class of a callback": (
        lambda c: callback(c).update(class_path=f"{HERE}.Repaly"),
        f"trainer.callbacks[0]: class_path {HERE}.Repaly: {HERE} has no 'Repaly', did you mean '{HERE}.Replay'?",
    ),
    "module of a class": (
        lambda c: data(c)["chooser"].update(class_path="datamodule.selectors.Dots"),
        "data.chooser: class_path datamodule.selectors.Dots: no module 'datamodule', "
        "did you mean 'datamodules.selectors.Dots'?",
    ),
    "class of another kind": (
        lambda c: data(c).update(chooser={"class_path": f"{HERE}.Replay"}),
        f"data.chooser: class_path {HERE}.Replay is no Chooser: give a subclass of it",
    ),
    "required": (lambda c: data(c).pop("path"), f"data.path is missing: {HERE}.Data needs it"),
    "no class": (
        lambda c: c["model"].pop("class_path"),
        "model: init_args without class_path: say which class they are for",
    ),
    "value that the class refuses": (
        lambda c: data(c)["chooser"]["init_args"].update(target=1.5),
        "target=1.5: expected a success rate in [0, 1]",
    ),
}


@pytest.mark.parametrize("name", IN_FILE)
def test_mistake_in_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = IN_FILE[name]
    assert error_line(["validate", "--config", written(tmp_path, change)], capsys) == expected


ON_COMMAND_LINE: dict[str, tuple[list[str], str]] = {
    "key": (["--model.lrr", "3"], f"model.lrr: {HERE}.Module has no option 'lrr', did you mean 'lr'?"),
    "key with =": (["--model.lrr=3"], f"model.lrr: {HERE}.Module has no option 'lrr', did you mean 'lr'?"),
    "group": (["--modle.lr", "3"], "modle: the configuration has no option 'modle', did you mean 'model'?"),
    "deep key": (
        ["--data.chooser.taget", "0.3"],
        f"data.chooser.taget: {HERE}.Aimed has no option 'taget', did you mean 'target'?",
    ),
    "abbreviation": (
        ["--trainer.max_step", "3"],
        "trainer.max_step: section trainer has no option 'max_step', did you mean 'max_steps'?",
    ),
    "type": (["--model.lr", "fast"], "model.lr=fast: expected float"),
    "class": (
        ["--data.chooser", f"{HERE}.Unifrm"],
        f"data.chooser: class_path {HERE}.Unifrm: {HERE} has no 'Unifrm', did you mean '{HERE}.Uniform'?",
    ),
}


@pytest.mark.parametrize("name", ON_COMMAND_LINE)
def test_mistake_on_the_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, expected = ON_COMMAND_LINE[name]
    assert error_line(["validate", "--config", written(tmp_path), *options], capsys) == expected


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    line = error_line(["validate", "--config", str(tmp_path / "rum.yaml")], capsys)
    assert line == f"{tmp_path / 'rum.yaml'}: no such file, did you mean 'run.yaml'?"


def test_broken_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model:\n  lr: [1\nb: 2\n")
    line = error_line(["validate", "--config", str(path)], capsys)
    assert line.startswith(f"{path}, line 3: not valid YAML: ")  # what follows is the YAML library's wording


def test_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_line(["fti"], capsys) == "subcommand 'fti' does not exist, did you mean 'fit'?"


def test_no_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_line([], capsys) == "a subcommand is missing: give one of fit, validate, test, predict"


def test_right_input_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_or_exit(lambda: command(["validate", "--config", written(tmp_path), "--model.drawing.top_k", "3"]))
    assert "ran" in capsys.readouterr().out


def test_debug_flag_gives_the_traceback(tmp_path: Path) -> None:
    path = written(tmp_path, lambda c: data(c)["chooser"]["init_args"].update(target=1.5))
    with pytest.raises(ValueError, match="success rate"):
        run_or_exit(lambda: command(["validate", "--config", path, "--debug"]))


def test_other_errors_pass_through() -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_or_exit(broken)


def test_wrapped_user_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def wrapped() -> None:
        try:
            raise UserError("size=0:\n  expected at least 1")
        except UserError as error:
            raise RuntimeError("while setting up") from error

    with pytest.raises(SystemExit) as stopped:
        run_or_exit(wrapped)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "dots: error: size=0: expected at least 1\n"
