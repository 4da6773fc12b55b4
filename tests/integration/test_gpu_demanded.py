"""A run that meant a GPU does not train on a CPU without a word, and on a GPU it computes in bfloat16."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from app.cli import DotsTrainer
from app.runs import gpus
from app.runs.gpus import GpuFacts
from tests.support.refusal import Place

DRIVERS = {
    "580.95.05": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\n"
    "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n",
    "535.288.01": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.288.01  Tue Nov 25 10:00:01 UTC 2025\n",
}
FIT = ("fit", "--config=run.yaml", "--trainer.enable_progress_bar=false")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Place.at(tmp_path, monkeypatch, capsys)


@pytest.fixture
def driver(place: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path_factory.mktemp("proc") / "version"
    file.write_text(DRIVERS["580.95.05"])
    monkeypatch.setattr(gpus, "DRIVER", file)


@pytest.mark.skipif(CUDAAccelerator.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_demanded_is_not_replaced(place: Place, accelerator: str) -> None:
    said = place.refused(*FIT, f"--trainer.accelerator={accelerator}")
    assert said.startswith(f"trainer.accelerator is {accelerator}, but torch can use no GPU here. No NVIDIA driver")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_auto_warns_where_a_driver_is_loaded(place: Place, driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = place.run(*FIT, "--trainer.accelerator=auto")
    assert code == 0, said[-2000:]
    [line] = [one for one in said.splitlines() if "CPU" in one]
    assert re.fullmatch(
        r"dots: warning: the run is on the CPU\. torch \S+ is a build for CPUs, though the driver 580\.95\.05 is "
        r"loaded\. Install torch for CUDA: .*\. Set trainer\.accelerator to cpu if that is meant, or to gpu to be "
        r"refused\.",
        line,
    )
    assert "is a build for CPUs" in place.refused(*FIT, "--trainer.accelerator=gpu")
    DotsTrainer(accelerator="cpu", logger=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    DotsTrainer(accelerator="auto", logger=False)
    assert "warning" not in place.capture.readouterr().err


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (GpuFacts(True, "580.95.05", "13.0", False), None),
        (GpuFacts(True, None, "6.4.43482", False), None),  # ROCm
        (GpuFacts(False, "535.288.01", "13.0", False), "535.288.01 is too old for torch's CUDA 13.0, which needs 580"),
        (GpuFacts(False, "470.256.02", "12.8", False), "470.256.02 is too old for torch's CUDA 12.8, which needs 525"),
        (GpuFacts(False, "580.65.06", "13.0", False), "CUDA 13.0 does not start with the driver 580.65.06"),
        (GpuFacts(False, None, "13.0", False), "No NVIDIA driver is loaded"),
        (GpuFacts(False, "580.65.06", "13.0", True), "CUDA_VISIBLE_DEVICES hides all GPUs"),
    ],
)
def test_the_obstacle_is_named(facts: GpuFacts, says: str | None) -> None:
    found = facts.obstacle()
    assert found is None if says is None else says in (found or "")


@pytest.mark.parametrize("version", DRIVERS)
def test_the_driver_is_read(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text(DRIVERS[version])
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    assert GpuFacts.read().driver == version


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_bf16_mixed_is_the_default_on_gpus(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def precision(**options: object) -> str:
        on = {"strategy": SingleDeviceStrategy("cpu")} if options.get("accelerator") == "cpu" else {}
        return str(DotsTrainer(devices=1, logger=False, **on, **options).precision)  # type: ignore[arg-type]

    assert [precision(), precision(accelerator="gpu"), precision(accelerator="cuda")] == ["bf16-mixed"] * 3
    assert precision(accelerator="gpu", precision="32-true") == "32-true"
    assert precision(accelerator="cpu") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert precision(accelerator="gpu") == "32-true"  # a GPU before Ampere would only emulate it


def test_describe_shows_the_precision_of_the_gpus_that_are_meant(place: Place) -> None:
    _, shown, _ = place.run_with_output("describe", "--config=run.yaml", "--trainer.accelerator=gpu")
    assert re.search(r"precision of computation \(trainer\.precision\)\W+bf16-mixed", shown)
    _, shown, _ = place.run_with_output("describe", "--config=run.yaml", "--trainer.accelerator=cpu")
    assert re.search(r"precision of computation \(trainer\.precision\)\W+32-true", shown)
