"""Errors in a config or an option: one line with the dotted name and the nearest valid one, exit code 2."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from app.cli.nulls import check_nulls
from app.cli.parsing import MOVED, DotsArgumentParser, MovedModule, run_or_exit
from callbacks.upkeep.failed_step import NOTE
from datamodules.errors import UserError

HERE = "tests.support.parsing_classes"
DDP = "lightning.pytorch.strategies.DDPStrategy"
GOOD: dict[str, Any] = {
    "trainer": {"logger": False, "callbacks": [{"class_path": f"{HERE}.Replay", "init_args": {"delta": 0.2}}]},
    "model": {"class_path": f"{HERE}.Module", "init_args": {"lr": 0.1, "drawing": {"temperature": 0.5}}},
    "data": {
        "class_path": f"{HERE}.Data",
        "init_args": {"path": "x", "chooser": {"class_path": f"{HERE}.Aimed", "init_args": {"target": 0.4}}},
    },
}


class Seen(Trainer):
    """A trainer whose validation prints a word to show that parsing and instantiation worked."""

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
        "modle is not an option. Did you mean 'model'?",
    ),
    "top-level scalar": (
        lambda c: c.update(ckpt_pth="last"),
        "ckpt_pth is not an option. Did you mean 'ckpt_path'?",
    ),
    "trainer key": (
        lambda c: c["trainer"].update(max_step=3),
        "trainer.max_step is not an option. Did you mean 'max_steps'?",
    ),
    "key in init_args": (
        lambda c: model(c).update(lrr=1),
        f"model.lrr is not an option of {HERE}.Module. Did you mean 'lr'?",
    ),
    "key two classes deep": (
        lambda c: data(c)["chooser"]["init_args"].update(taget=0.3),
        f"data.chooser.taget is not an option of {HERE}.Aimed. Did you mean 'target'?",
    ),
    "key of a dataclass": (
        lambda c: model(c)["drawing"].update(temprature=1),
        f"model.drawing.temprature is not an option of {HERE}.Drawing. Did you mean 'temperature'?",
    ),
    "key of a callback": (
        lambda c: callback(c)["init_args"].update(detla=1),
        f"trainer.callbacks.detla is not an option of {HERE}.Replay. Did you mean 'delta'?",
    ),
    "type": (lambda c: model(c).update(lr="fast"), "model.lr=fast: expected float."),
    "type, deep": (
        lambda c: data(c)["chooser"]["init_args"].update(target="half"),
        "data.chooser.target=half: expected float.",
    ),
    "type in a dataclass": (
        lambda c: model(c)["drawing"].update(temperature="hot"),
        "model.drawing.temperature=hot: expected float.",
    ),
    "type of a trainer option": (
        lambda c: c["trainer"].update(min_steps="few"),
        "trainer.min_steps=few: expected int or null.",
    ),
    "optional type, deep": (
        lambda c: callback(c)["init_args"].update(capacity="many"),
        "trainer.callbacks.capacity=many: expected int or null.",
    ),
    "literal": (
        lambda c: model(c).update(loss="grppo"),
        "model.loss=grppo: expected one of 'grpo', 'dapo'. Did you mean 'grpo'?",
    ),
    "literal, deep": (
        lambda c: data(c)["chooser"]["init_args"].update(mode="kernal"),
        "data.chooser.mode=kernal: expected one of 'kernel', 'trained'. Did you mean 'kernel'?",
    ),
    "class": (
        lambda c: data(c)["chooser"].update(class_path=f"{HERE}.Aimd"),
        f"data.chooser={HERE}.Aimd: module '{HERE}' has no attribute 'Aimd'. Did you mean '{HERE}.Aimed'?",
    ),
    "class of a callback": (
        lambda c: callback(c).update(class_path=f"{HERE}.Repaly"),
        f"trainer.callbacks={HERE}.Repaly: module '{HERE}' has no attribute 'Repaly'. Did you mean '{HERE}.Replay'?",
    ),
    "module of a class": (
        lambda c: data(c)["chooser"].update(class_path="test.suport.parsing_classes.Aimed"),
        f"data.chooser=test.suport.parsing_classes.Aimed: No module named 'test.suport'. Did you mean '{HERE}.Aimed'?",
    ),
    "class of another kind": (
        lambda c: data(c).update(chooser={"class_path": f"{HERE}.Replay"}),
        f"data.chooser={HERE}.Replay: does not correspond to a subclass of Chooser. Did you mean '{HERE}.Aimed'?",
    ),
    "required": (
        lambda c: data(c).pop("path"),
        f"data.path is missing: {HERE}.Data needs it. Set it in a --config file or as --data.path",
    ),
    "no class": (
        lambda c: c["model"].pop("class_path"),
        "model.drawing is not an option of lightning.LightningModule. Is model.class_path missing?",
    ),
    "option of a class in a union with str": (
        lambda c: c["trainer"].update(strategy={"class_path": DDP, "init_args": {"bucket_cap": 25}}),
        f"trainer.strategy.bucket_cap is not an option of {DDP}. Did you mean 'bucket_cap_mb'?",
    ),
    "value in place of a class": (
        lambda c: data(c).update(chooser=5),
        "data.chooser=5: expected subclass of Chooser or null.",
    ),
    "null in place of a group of options": (
        lambda c: model(c).update(validation=None),
        "model.validation is null, expected options (temperature, top_k). Leave validation out for its default.",
    ),
    "number in place of a group of options": (
        lambda c: model(c).update(validation=2),
        "model.validation is 2, expected options (temperature, top_k). Write them below it, by name.",
    ),
    "null": (lambda c: model(c).update(lr=None), "model.lr is null, expected float. Leave lr out for its default."),
    "null of a literal": (
        lambda c: model(c).update(loss=None),
        "model.loss is null, expected one of grpo, dapo. Leave loss out for its default.",
    ),
    "null in a group of options": (
        lambda c: model(c).update(drawing={"top_k": None}),
        "model.drawing.top_k is null, expected int. Leave top_k out for its default.",
    ),
    "null, deep": (
        lambda c: data(c)["chooser"]["init_args"].update(target=None),
        "data.chooser.target is null, expected float. Leave target out for its default.",
    ),
    "null of a callback": (
        lambda c: callback(c)["init_args"].update(delta=None),
        "trainer.callbacks[0].delta is null, expected float. Leave delta out for its default.",
    ),
    "null of a trainer option": (
        lambda c: c["trainer"].update(max_steps=None),
        "trainer.max_steps is null, expected int. Leave max_steps out for its default.",
    ),
    "null of the trainer": (lambda c: c.update(trainer=None), "trainer is null. Leave it out for its default."),
    "null of the seed": (
        lambda c: c.update(seed_everything=None),
        "seed_everything is null. Leave it out for its default.",
    ),
    "value that the class refuses": (
        lambda c: data(c)["chooser"]["init_args"].update(target=1.5),
        "target=1.5: expected a success rate in [0, 1]",
    ),
}


@pytest.mark.parametrize("name", IN_FILE)
def test_mistake_in_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = IN_FILE[name]
    path = written(tmp_path, change)
    # What jsonargparse finds while it reads a file is reported with the file's name, what it finds later without.
    assert error_line(["validate", "--config", path], capsys).removeprefix(f"{path}: ") == expected


ON_COMMAND_LINE: dict[str, tuple[list[str], str]] = {
    "key": (["--model.lrr", "3"], f"model.lrr is not an option of {HERE}.Module. Did you mean 'lr'?"),
    "key with =": (["--model.lrr=3"], f"model.lrr is not an option of {HERE}.Module. Did you mean 'lr'?"),
    "group": (["--modle.lr", "3"], "modle is not an option. Did you mean 'model'?"),
    "deep key": (
        ["--data.chooser.taget", "0.3"],
        f"data.chooser.taget is not an option of {HERE}.Aimed. Did you mean 'target'?",
    ),
    "abbreviation": (
        ["--trainer.max_step", "3"],
        "trainer.max_step is not an option. Did you mean 'max_steps'?",
    ),
    "type": (["--model.lr", "fast"], "model.lr=fast: expected float."),
    "short name of a class": (
        ["--data.chooser", "Unifrm"],
        "data.chooser=Unifrm: no class of this name is known. Did you mean 'Uniform'?",
    ),
    "null in place of a group of options": (
        ["--model.validation", "null"],
        "model.validation=null: expected options by name, as in --model.validation.NAME VALUE, or a file of them.",
    ),
    "class": (
        ["--data.chooser", f"{HERE}.Unifrm"],
        f"data.chooser={HERE}.Unifrm: module '{HERE}' has no attribute 'Unifrm'. Did you mean '{HERE}.Uniform'?",
    ),
}


@pytest.mark.parametrize("name", ON_COMMAND_LINE)
def test_mistake_on_the_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, expected = ON_COMMAND_LINE[name]
    assert error_line(["validate", "--config", written(tmp_path), *options], capsys) == expected


def test_the_file_of_a_mistake_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = written(tmp_path)
    wrong = tmp_path / "second.yaml"
    wrong.write_text("model:\n  init_args:\n    lr: fast\n")
    line = error_line(["validate", "--config", good, "--config", str(wrong)], capsys)
    assert line == f"{wrong}: model.lr=fast: expected float."


@pytest.mark.parametrize("on_command_line", [False, True])
def test_moved_class_path(
    on_command_line: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MOVED, "tests.support.old_choosers.OldAimed", f"{HERE}.Aimed")
    monkeypatch.setitem(sys.modules, "tests.support.old_choosers", MovedModule("tests.support.old_choosers"))
    old = "tests.support.old_choosers.OldAimed"
    options = ["--data.chooser", old] if on_command_line else []
    path = written(tmp_path, lambda c: None if on_command_line else data(c)["chooser"].update(class_path=old))
    command(["validate", "--config", path, *options])
    said = capsys.readouterr()
    assert "ran" in said.out
    lines = [line for line in said.err.splitlines() if "has moved" in line]
    assert lines == [f"dots: warning: class_path {old} has moved and will stop working. Write {HERE}.Aimed instead"]


@pytest.mark.parametrize("old", list(MOVED))
def test_moved_classes_are_found(old: str) -> None:
    module, _, name = old.rpartition(".")
    new_module, _, new_name = MOVED[old].rpartition(".")
    assert getattr(import_module(module), name) is getattr(import_module(new_module), new_name)


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    line = error_line(["validate", "--config", str(tmp_path / "rum.yaml")], capsys)
    assert line == f"{tmp_path / 'rum.yaml'}: no such file. Did you mean 'run.yaml'?"


def test_broken_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model:\n  lr: [1\nb: 2\n")
    line = error_line(["validate", "--config", str(path)], capsys)
    assert line.startswith(f"{path}: Problems parsing config: ")  # what follows is the YAML library's wording
    assert "line 3" in line


def test_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_line(["fti"], capsys) == "subcommand 'fti' does not exist. Did you mean 'fit'?"


def test_no_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert "to be one of {fit,validate,test,predict}, but it was not provided" in error_line([], capsys)


def test_null_where_it_is_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(config: dict[str, Any]) -> None:
        model(config).update(drawing=None)
        data(config).update(chooser=None)
        callback(config)["init_args"].update(capacity=None)
        config["trainer"].update(max_epochs=None, precision=None)

    command(["validate", "--config", written(tmp_path, change)])
    assert "ran" in capsys.readouterr().out


class Unreadable:
    def __init__(self, size: Absent = 3) -> None:  # type: ignore[name-defined]  # noqa: F821
        pass


def test_annotations_that_cannot_be_read_allow_null() -> None:
    given = Namespace(class_path=f"{__name__}.Unreadable", init_args=Namespace(size=None))
    check_nulls(Namespace(model=given))


def test_right_input_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_or_exit(lambda: command(["validate", "--config", written(tmp_path), "--model.drawing.top_k", "3"]))
    assert "ran" in capsys.readouterr().out


def test_debug_flag_gives_the_traceback(tmp_path: Path) -> None:
    path = written(tmp_path, lambda c: data(c)["chooser"]["init_args"].update(target=1.5))
    with pytest.raises(ValueError, match="success rate"):
        run_or_exit(lambda: command(["validate", "--config", path, "--debug"]))


def _fail(error: BaseException) -> None:
    raise error


def test_any_other_error_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_or_exit(lambda: _fail(ZeroDivisionError("a bug\nof ours")))
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("dots: error: ZeroDivisionError: a bug of ours (at ")
    assert line.endswith(f"{Path(__file__).name}:{_fail.__code__.co_firstlineno + 1} in _fail). Run again with --debug "
                         "for the traceback.\n")  # fmt: skip


def test_an_error_of_a_training_that_has_begun_passes_through() -> None:
    error = ZeroDivisionError("a bug")
    error.add_note(f"{NOTE} 3 with prompts a, b.")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_or_exit(lambda: _fail(error))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(0)], ids=["Ctrl-C", "--help"])
def test_exits_of_the_command_itself_pass_through(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.failures._OURS", (str(Path(__file__).parent),))  # raised by a file of the command
    with pytest.raises(type(error)):
        run_or_exit(lambda: _fail(error))


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
