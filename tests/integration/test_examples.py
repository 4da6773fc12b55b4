"""The examples run as their first lines say, for a few steps, and do what the documentation says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from app.cli.dots import main
from tests.support.command import ROOT, logged

pytestmark = pytest.mark.slow
FEW = ["--trainer.max_steps", "2", "--completions.every", "1"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and configs, as in a clone."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def fit(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Path:
    """Return the folder of a run that is started in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["dots"])
    main(["fit", *arguments, *FEW])
    return max((folder / "runs").glob("*/version_*"), key=lambda run: run.stat().st_mtime)


def test_math_chooses_and_measures(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(clone / "examples" / "math", monkeypatch, "--config", "run.yaml")
    found = logged(run)
    assert 0.1 < found["val/accuracy"][0] < 0.7  # sums of two to eight terms: the policy knows the short ones
    rows = pq.read_table(run / "completions" / "step_00000000.parquet").to_pylist()
    right = [row for row in rows if row["correctness"]]
    assert right and all("#### " in row["completion"] for row in right)


def test_words_are_scored_by_two_functions(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(clone / "examples" / "words", monkeypatch, "--config", "run.yaml")
    rows = pq.read_table(run / "completions" / "step_00000000.parquet").to_pylist()
    assert (
        len(rows) == 64 and len({row["correctness"] for row in rows}) == 2
    )  # the policy has learnt six letters, not seven
    for row in rows:
        word = row["question"].rpartition(": ")[2]
        assert row["correctness"] == float(row["completion"].rpartition("#### ")[2].strip() == word[::-1])
        assert row["reward"] == pytest.approx(row["correctness"] + 0.2 * row["reward/right_letters"])
    assert "rewards/right_letters/length_error" in logged(run)


@pytest.mark.long
def test_lora_trains_adapters_only(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(
        clone / "examples" / "math",
        monkeypatch,
        "--config",
        "run.yaml",
        "--config",
        "../lora/run.yaml",
        "--data.val_size",
        "4",
    )
    assert run.parent.name == "lora"
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    up = [tensor for name, tensor in state.items() if "lora_B" in name]
    assert up and all(tensor.shape[1] == 8 for tensor in up) and any(tensor.any() for tensor in up)
    assert logged(run)["difficulty/reference_success"]


@pytest.mark.long
def test_from_python(clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(clone)
    names: dict[str, object] = {"__file__": str(clone / "examples" / "from_python.py"), "__name__": "example"}
    exec(compile((clone / "examples" / "from_python.py").read_text(), "from_python.py", "exec"), names)
    names["main"](2)  # type: ignore[operator]
    assert "after 2 updates" in capsys.readouterr().out


@pytest.mark.long
def test_the_notebook_runs(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code cells in order, in one namespace: what a kernel does, without one to install."""
    monkeypatch.chdir(clone / "examples")
    cells = json.loads(Path("notebook.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "STEPS = 6" in code[0]
    names: dict[str, object] = {"__name__": "notebook"}
    for source in [code[0].replace("STEPS = 6", "STEPS = 2"), *code[1:]]:
        exec(compile(source, "notebook.ipynb", "exec"), names)
    by_prompt, forecast = names["by_prompt"], names["forecast"]
    assert 8 <= len(by_prompt) <= 16 and by_prompt["success"].between(0, 1).all()  # type: ignore[arg-type,index]
    assert len(forecast) == 88 and forecast.between(0, 1).all()  # type: ignore[arg-type,attr-defined]
