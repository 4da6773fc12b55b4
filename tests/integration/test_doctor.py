"""`dots doctor` and its short form before a training, through the command; overlays for hardware fit their cards."""

from __future__ import annotations

import re
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from app.cli import doctor
from app.runs import gpus
from tests.support.refusal import ROOT, Place, callback, model, source
from tests.support.stand_in_server import COMPLETIONS, TOKENS, stand_in
from tests.support.tables import few

DOCTOR = ("doctor", "--config=run.yaml")
FIT = ("fit", "--config=run.yaml", "--trainer.enable_progress_bar=false")
SERVER = "{class_path: app.engines.VllmServer, init_args: {server: {port: %d}}}"
Usage = namedtuple("Usage", "total used free")

pytestmark = pytest.mark.skipif(CUDAAccelerator.is_available(), reason="this machine has a GPU")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "no_driver")
    return Place.at(tmp_path, monkeypatch, capsys)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def examined(place: Place, *more: str) -> tuple[int, dict[str, str], str]:
    """Return exit code, the line of each check by its name, and all output."""
    code, out, said = place.run_with_output(*DOCTOR, *more)
    assert "dots: " not in said or code == 2, said[-2000:]
    shown = [one for one in out.splitlines() if one.startswith(("ok    ", "check "))]
    lines = {one[6:].partition(": ")[0]: one for one in shown}
    return code, lines, out


def test_a_run_that_fits_is_ok(place: Place) -> None:
    code, lines, out = examined(place)
    assert code == 0, out
    assert list(lines) == [
        "versions", "GPUs", "settings", "memory", "checkpoints", "attention", "kernels", "reward workers", "loggers",
        "prompts", "rewards",
    ]  # fmt: skip
    assert all(line.startswith("ok    ") for line in lines.values())
    assert lines["kernels"].endswith(": 0 of 4 layers fused, torch's kernels")
    assert f"torch {torch.__version__}" in lines["versions"]
    assert lines["prompts"].endswith("train 8") and lines["loggers"].endswith("TensorBoardLogger")
    assert not (place.path / "runs").exists()


def test_the_size_of_checkpoints_is_that_of_a_real_one(place: Place) -> None:
    # Rewards that differ: without an advantage AdamW has no state to save.
    reward = "def one(completions, **_):\n    return [i % 2 for i in range(len(completions))]\n"
    (place.path / "alternating.py").write_text(reward)
    code, said = place.run(*FIT, "--model.rewards=alternating.py:one")
    assert code == 0 and "may not fit" not in said, said[-2000:]
    saved = place.path / "runs/small/version_0/checkpoints/last.ckpt"
    _, lines, _ = examined(place)
    copies, size = re.findall(r"(\d+) of ([\d.]+) MiB", lines["checkpoints"])[0]
    assert float(size) == pytest.approx(saved.resolve().stat().st_size / 2**20, rel=0.05)
    assert int(copies) == 3


def test_a_disk_that_is_too_small(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Any) -> Any:
        return Usage(2**30, 2**30 - 2**20, 2**20) if str(path).startswith(str(place.path)) else real(path)

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", usage)
    code, lines, out = examined(place)
    assert code == 1 and out.splitlines()[-1] == "1 of 11 checks need a look"
    assert lines["checkpoints"].startswith("check checkpoints: 3 of ")
    assert "Free disk space, lower checkpoint.keep" in lines["checkpoints"]
    code, said = place.run(*FIT)
    assert code == 0
    warning = [one for one in said.splitlines() if one.startswith(("dots: warning", "check "))]
    assert warning == ["dots: warning: the run may not fit here (dots doctor shows all checks)", lines["checkpoints"]]


def test_a_port_that_is_taken_and_an_engine_that_is_not_installed(
    place: Place, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    code, lines, _ = examined(place, f"--model.engine={SERVER % taken}")
    assert code == 1
    assert f"{taken} is taken. Another process listens on it. Set model.engine.server.port" in lines["port"]
    assert lines["shared memory"].startswith("ok")
    _, lines, out = examined(place, f"--model.engine={SERVER % 0}")
    assert "port" not in lines and "Run make vllm (GPUs) or make vllm-cpu." in out
    url = "{class_path: app.engines.VllmServer, init_args: {url: 'http://127.0.0.1:%d'}}"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        code, lines, _ = examined(place, f"--model.engine={url % closed.getsockname()[1]}")
    assert code == 1 and "does not answer. Start it with dots serve" in lines["server"]
    assert lines["prompts"].startswith("ok    prompts: not read")


def test_the_endpoint_of_a_running_server(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with stand_in() as server:
        engine = {"class_path": "app.engines.VllmServer", "init_args": {"url": server.url}}
        place.config(lambda config: model(config).update(engine=engine))
        code, lines, out = examined(place)
        assert code == 0, out
        assert lines["endpoint"] == f"ok    endpoint: completions come from {TOKENS}"
        server.offers_tokens = False
        _, lines, _ = examined(place)
        assert lines["endpoint"] == (
            f"ok    endpoint: completions come from {COMPLETIONS}, as {server.url} lacks {TOKENS} (--enable-scale-out)"
        )
        code, lines, _ = examined(place, "--model.engine.endpoint=tokens")
        assert code == 1
        assert lines["endpoint"].startswith("check endpoint: refused. engine.endpoint is tokens, but http")


def test_a_gpu_that_is_demanded(place: Place) -> None:
    code, lines, _ = examined(place, "--trainer.accelerator=gpu", "--trainer.devices=8")
    assert code == 1
    assert lines["GPUs"].startswith("check GPUs: none that torch can use, no NVIDIA driver. No NVIDIA driver is loaded")
    assert (
        lines["memory"].startswith("ok    memory: about ")
        and "flash (trainer.precision bf16-mixed)" in lines["attention"]
    )
    assert "8 x 2 on" in lines["reward workers"]
    _, lines, _ = examined(place, "--trainer.accelerator=gpu", "--trainer.precision=32-true")
    assert "Set trainer.precision to bf16-mixed" in lines["attention"]
    _, lines, _ = examined(
        place, "--trainer.accelerator=gpu", "--trainer.devices=2", "--model.engine=VllmServer",
        "--model.engine.server.devices=[1,2]",
    )  # fmt: skip
    assert "server.devices names GPU 1, but torch sees no GPU here" in lines["servers"]


def test_engines_in_the_training_processes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: True)  # vLLM may not be installed here
    several = ("--trainer.accelerator=gpu", "--trainer.devices=4", "--model.engine=Vllm")
    _, lines, _ = examined(place, *several)
    assert lines["engine"] == "ok    engine: vLLM in the training processes: 4 engines, asleep during updates"
    _, lines, _ = examined(place, *several, "--model.engine.tensor_parallel_size=2", "--model.engine.sleep_level=0")
    assert lines["engine"] == "ok    engine: vLLM in the training processes: 2 engines"
    _, lines, _ = examined(place, *several, "--model.engine.tensor_parallel_size=3")
    assert "tensor_parallel_size must divide the training processes" in lines["engine"]


def test_memory_that_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_ram", lambda: 2**20)
    code, lines, _ = examined(place)
    assert code == 1
    assert "of the 1.0 MiB free of this machine. Lower model.max_tokens_per_microbatch" in lines["memory"]


def test_data_that_cannot_be_read_and_a_config_that_is_wrong(place: Place) -> None:
    place.config(lambda config: source(config).update(path="missing.jsonl"))
    code, lines, _ = examined(place)
    assert code == 1 and lines["prompts"].startswith("check prompts: refused. ") and "missing.jsonl" in lines["prompts"]
    assert "trainer.max_stps" in place.refused(*DOCTOR, "--trainer.max_stps=3")
    place.config(lambda config: model(config)["policy"].update(path="missing"))
    assert "missing" in place.refused(*DOCTOR)


def test_what_the_run_would_refuse(place: Place) -> None:
    code, lines, _ = examined(place, "--trainer.accelerator=gpu", "--trainer.precision=bf16-true")
    assert code == 1 and "trainer.precision is bf16-true, expected one of 32-true" in lines["settings"]
    code, lines, _ = examined(place, "--trainer.num_nodes=2", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert code == 1 and "Set data.prompts_per_step to at least 4" in lines["settings"]
    (place.path / "late.py").write_text("def late(completions, **_):\n    import no_such_package\n")
    code, lines, _ = examined(place, "--model.rewards=late.py:late")
    assert code == 1 and lines["prompts"].startswith("ok ")
    assert "refused. Reward 'late' cannot import what it uses (No module named 'no_such_package')" in lines["rewards"]
    code, lines, _ = examined(place, "--trainer.logger.init_args.save_dir=pool.jsonl")
    assert code == 1 and "pool.jsonl is no folder that can be written to" in lines["checkpoints"]


def test_the_short_form_is_fast_and_draws_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, states = [], []
    short = doctor.before_training

    def timed(*given: Any) -> str:
        started, state = time.perf_counter(), torch.get_rng_state()
        said = short(*given)
        seconds.append(time.perf_counter() - started)
        states.append(torch.equal(state, torch.get_rng_state()))
        return said

    monkeypatch.setattr("app.cli.trainer.before_training", timed)
    place.config(lambda config: callback(config, "RunCheckpoint").update(every=9))
    assert place.run(*FIT)[0] == 0
    assert states == [True] and seconds[0] < 0.5


CARDS = {"1x24gb": 24, "1x80gb": 80, "8x80gb": 80, "2x8x80gb": 80}
OWN_QWEN = ("--model.policy.path", str(ROOT / "tests/fixtures/qwen2.5_math_1.5b"))
BASES = {
    "quickstart": (f"--config={ROOT}/configs/quickstart.yaml",),
    "paper": tuple(
        f"--config={ROOT}/configs/paper/dots/{name}.yaml" for name in ("base", "qwen2.5_math_1.5b_deepscaler")
    ),
}


@pytest.mark.parametrize(("card", "base"), few([(card, base) for base in reversed(BASES) for card in CARDS], 2))
def test_an_overlay_fits_its_cards(place: Place, card: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the estimate of memory, on a card less vLLM's share of it and a GiB for CUDA and its allocator."""
    monkeypatch.setattr(doctor.Place, "_prompts", lambda self: iter(()))
    overlay = f"--config={ROOT}/configs/hardware/{card}.yaml"
    qwen = OWN_QWEN if base == "paper" else (f"--model.policy.path={ROOT}/configs/tiny_policy",)
    code, out, said = place.run_with_output("describe", *BASES[base], overlay, *qwen)
    assert code == 0, said[-2000:]
    assert re.search(r"\(trainer\.precision\)\W+bf16-mixed", out)
    _, out, _ = place.run_with_output("doctor", *BASES[base], overlay, *qwen)
    size, unit = re.findall(r"memory: about ([\d.]+) (GiB|MiB) per process", out)[0]
    share = 0.35 if card.startswith("1x") else 0.0
    assert float(size) * (1 if unit == "GiB" else 2**-10) + 1 <= CARDS[card] * (1 - share) * 1e9 / 2**30
