"""Whatever user code raises: before the first step it is one line and no file, afterwards the step is named."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.failing import MODULES
from tests.support.refusal import Place, data, model
from tests.support.tables import few

pytestmark = pytest.mark.slow

FIT = ("fit", "--config", "run.yaml")
NAME = "dots_failing_code"


def _user_code(config: dict[str, Any]) -> None:
    """Name a class of the user's module wherever a config can name one."""
    config["model"]["class_path"] = f"{NAME}.Model"
    config["data"]["class_path"] = f"{NAME}.Data"
    config["trainer"]["logger"] = {"class_path": f"{NAME}.Logger"}
    config["trainer"]["callbacks"].append({"class_path": f"{NAME}.Watch"})
    model(config)["rewards"] = [{"class_path": "dots_failing_rewards.Score"}]
    model(config)["engine"] = {"class_path": f"{NAME}.Engine"}
    data(config)["selector"] = {"class_path": f"{NAME}.Choice"}
    data(config)["train"]["class_path"] = f"{NAME}.Source"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    for name, text in MODULES.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]  # restored afterwards: what was not imported
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    made = Place.at(tmp_path, monkeypatch, capsys)
    made.config(_user_code)
    return made


STAGES = (
    "callback", "logger", "model", "data", "selector", "reward", "engine", "data loading", "tokenizer",
    "configure_model", "callback setup", "on_fit_start", "on_train_start", "configure_optimizers", "first choice",
    "engine start", "first rollout",
)  # fmt: skip
RAISED = (
    "RuntimeError", "RecursionError", "MemoryError", "ModuleNotFoundError", "SyntaxError", "UnicodeDecodeError",
    "KeyError", "Unprintable", "Closed", "ExceptionGroup", "BaseExceptionGroup", "SystemExit", "StopIteration",
    "GeneratorExit", "AssertionError", "OSError", "ValueError", "ZeroDivisionError", "FloatingPointError", "TypeError",
)  # fmt: skip


def _assert_names(line: str, raised: str) -> None:
    assert line.isprintable() and len(line) < 900
    assert raised in line
    assert "dots_failing_raise.py:" in line or "dots_failing_code.py:" in line or "my_other_rewards.py:1" in line
    assert line.endswith("Run again with --debug for the traceback.")


@pytest.mark.parametrize("raised", few(RAISED, 2))
def test_import_of_user_code(place: Place, monkeypatch: pytest.MonkeyPatch, raised: str) -> None:
    monkeypatch.setenv("FAIL_AT", "import")
    monkeypatch.setenv("FAIL_WITH", raised)
    _assert_names(place.refused(*FIT), raised)


# Every stage with an exception, and every exception at some stage.
@pytest.mark.parametrize(("stage", "raised"), few(zip(STAGES, RAISED, strict=False), 5))
def test_start(place: Place, monkeypatch: pytest.MonkeyPatch, stage: str, raised: str) -> None:
    monkeypatch.setenv("FAIL_AT", stage)
    monkeypatch.setenv("FAIL_WITH", raised)
    _assert_names(place.refused(*FIT), raised)


OTHERS = (
    ("validate", "engine start", "KeyError"), ("test", "first rollout", "RuntimeError"),
    ("predict", "data loading", "StopIteration"), ("describe", "selector", "ExceptionGroup"),
    ("export", "configure_model", "SystemExit"), ("select", "tokenizer", "Unprintable"),
    ("serve", "engine", "RecursionError"), ("validate", "callback setup", "GeneratorExit"),
    ("test", "logger", "UnicodeDecodeError"), ("predict", "first rollout", "BaseExceptionGroup"),
    ("describe", "model", "AssertionError"), ("export", "import", "SyntaxError"),
    ("select", "data", "MemoryError"), ("serve", "reward", "Closed"), ("validate", "on_validation_start", "OSError"),
)  # fmt: skip
OPTIONS = {
    "export": ("--ckpt_path", "saved.ckpt", "--out", "exported"),
    "select": ("--method", "ufo", "--keep", "2", "--out", "subset.jsonl"),
}


@pytest.mark.parametrize(("command", "stage", "raised"), few(OTHERS, 4))
def test_start_of_other_commands(
    place: Place, monkeypatch: pytest.MonkeyPatch, command: str, stage: str, raised: str
) -> None:
    if command == "export":
        shutil.copy(_saved(place), place.path / "saved.ckpt")
        shutil.rmtree(place.path / "runs")
        place.config(_user_code)
    if command in ("validate", "test", "predict"):
        monkeypatch.setenv("FAIL_AT", "nowhere")
        place.config(lambda config: (_user_code(config), data(config).update(val_size=2)))
    monkeypatch.setenv("FAIL_AT", stage)
    monkeypatch.setenv("FAIL_WITH", raised)
    _assert_names(place.refused(command, "--config", "run.yaml", *OPTIONS.get(command, ())), raised)


def _saved(place: Place) -> Path:
    """Return the checkpoint of a run of the small policy."""
    place.config(lambda config: None)
    assert place.run(*FIT)[0] == 0
    return place.path / "runs/small/version_0/checkpoints/step_00000001.ckpt"


@pytest.mark.long
def test_export_to_a_place_that_cannot_be(place: Place) -> None:
    saved = str(_saved(place))
    (place.path / "file").write_text("mine")
    small = place.path / "small"
    small.mkdir()
    places = ["file", "file/below/it", "/proc/x", "x" * 300, "/dev/null/x"]
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode
    places += [] if mounted else ["small/full"]
    try:
        for out in places:
            line = place.refused("export", "--config", "run.yaml", "--ckpt_path", saved, "--out", out)
            assert f"{out} cannot be written" in line or f"--out {out} exists and is not an empty" in line, line
    finally:
        if not mounted:
            subprocess.run(["umount", str(small)], check=True)


STUDIES = {
    "base": ("compare", "--base", "broken.yaml", "--arms", "a=run.yaml", "b=run.yaml", "--out", "o"),
    "arm": ("compare", "--base", "run.yaml", "--arms", "b=broken.yaml", "a=run.yaml", "--out", "o"),
    "forecast": ("forecast", "--config", "broken.yaml", "--traces", "pool.jsonl", "--selector", "Dots", "--out", "o"),
    "difficulty": ("difficulty", "fit", "--config", "broken.yaml"),
    "data": ("data", "--config", "broken.yaml"),
}
BROKEN = {"a: [": "while parsing a flow node", "\x00": "unacceptable character", "5": "mapping", "- 1\n- 2": "mapping"}


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("study", STUDIES)
def test_start_of_a_study(place: Place, study: str, content: str) -> None:
    (place.path / "broken.yaml").write_text(content)
    line = place.refused(*STUDIES[study])
    assert "broken.yaml" in line and BROKEN[content] in line, line
    assert line.isprintable() and len(line) < 900


AFTERWARDS = ("RuntimeError", "StopIteration", "SystemExit")


@pytest.mark.parametrize("raised", AFTERWARDS)
def test_a_training_that_has_begun_ends_with_its_step(
    place: Place, monkeypatch: pytest.MonkeyPatch, raised: str
) -> None:
    monkeypatch.setenv("FAIL_AT", "end of step 1")
    monkeypatch.setenv("FAIL_WITH", raised)
    arguments = (*FIT, "--trainer.max_steps=3")
    saved = "runs/small/version_0/checkpoints/step_00000001.ckpt"
    expected = rf"stopped in step 1 with prompts \w{{16}}, \w{{16}}\. The newest checkpoint is {saved}\. Run the same"
    if raised == "SystemExit":  # has no traceback
        code, said = place.run(*arguments)
        assert code == 1
        assert re.search(expected, next(line for line in said.splitlines() if line.startswith("dots: error: ")))
    else:
        with pytest.raises(RuntimeError) as error:
            place.run(*arguments)
        assert re.search(expected, "".join(traceback.format_exception(error.value)))
    assert (place.path / saved).exists()
