"""A run's own servers: the GPUs that each of them sees, prompts dealt by load, and the dtype that they serve."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from transformers import AutoTokenizer

from app.engines import Sampling, VllmServer
from app.engines.requests import EngineError
from app.engines.server.options import FleetOptions, ServerOptions
from app.engines.server.placement import server_gpus, visible_gpus
from app.engines.server.process import free_port
from callbacks.upkeep.checks import gpus_of_trainer
from datamodules.errors import UserError
from datamodules.types import Prompt
from tests.support import stand_in_server
from tests.support.policies import TINY, tiny_model
from tests.support.refusal import Place
from tests.support.stand_in_server import Asked, StandIn, Written, fives, stand_in

TOKENIZER = AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch see four GPUs, listed as a scheduler does."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-12ab34cd-1, 6,7,9")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    uuids = ["44444444", "12ab34cd-1", "66666666", "77777777"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", i, "", "", (5, 6, 7), {}) for i in range(count)]


def test_indices_are_those_of_the_visible_gpus(four_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus() == ["4", "GPU-12ab34cd-1", "6", "7"]
    assert server_gpus([1, "3"], 1, {0}) == ["GPU-12ab34cd-1", "7"]
    assert server_gpus([0, 1, 2, 3], 2, ()) == ["4,GPU-12ab34cd-1", "6,7"]
    assert server_gpus(["GPU-12ab", "GPU-ffff"], 1, {0}) == ["GPU-12ab34cd-1", "GPU-ffff"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert server_gpus([2], 1, {0, 1}) == ["2"]


def test_without_devices_one_server_gets_what_training_leaves(four_gpus: None) -> None:
    assert server_gpus(None, 1, {0, 1}) == ["6"]
    assert server_gpus(None, 2, {0, 1}) == ["6,7"]
    assert server_gpus(None, 1, {0, 1, 2, 3}) == [None]  # shares the first GPU
    assert server_gpus(None, 2, {0, 1, 2}) == [None]
    assert server_gpus(None, 1, ()) == [None]  # trains on the CPU


@pytest.mark.parametrize(
    ("devices", "size", "message"),
    [
        ([1], 1, r"names GPU 1, on which a training process runs: trainer\.devices uses 0, 1\."),
        (["GPU-44444444"], 1, r"names GPU GPU-44444444, on which a training process runs"),
        (["GPU-12ab"], 1, r"names GPU GPU-12ab, on which a training process runs"),
        ([4], 1, r"names GPU 4, but torch sees the GPUs 0 to 3 here \(CUDA_VISIBLE_DEVICES=4,GPU-12ab34cd-1, 6,7,9\)"),
        ([-1], 1, r"names GPU -1, but torch sees the GPUs 0 to 3"),
        ([2, 3, 2], 1, r"names GPU 2 twice"),
        ([2, 3, 0], 2, r"names 3 GPUs, expected a multiple of server\.tensor_parallel_size, which is 2"),
        ([], 1, r"names 0 GPUs"),
        (["cuda:1"], 1, r"has 'cuda:1', expected an index"),
    ],
)
def test_gpus_that_servers_cannot_have(four_gpus: None, devices: list[int | str], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        server_gpus(devices, size, {0, 1})


def test_the_gpus_of_training_are_those_of_its_strategy() -> None:
    gpus = [torch.device("cuda", 0), torch.device("cuda", 3)]
    assert gpus_of_trainer(SimpleNamespace(strategy=DDPStrategy(parallel_devices=gpus))) == [0, 3]
    assert gpus_of_trainer(SimpleNamespace(strategy=SingleDeviceStrategy(gpus[1]))) == [3]
    assert gpus_of_trainer(SimpleNamespace(strategy=SingleDeviceStrategy("cpu"))) == []


def test_devices_are_refused_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    place = Place.at(tmp_path, monkeypatch, capsys)
    said = place.refused("fit", "--config=run.yaml", "--model.engine=VllmServer", "--model.engine.server.devices=[1,2]")
    assert said == "server.devices names GPU 1, but torch sees no GPU here. Change it."


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start stand-ins in place of vLLM's servers, as processes with the same environment."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(
        ServerOptions, "command", lambda self, path, dtype, port: [sys.executable, stand_in_server.__file__, str(port)]
    )


def server_of(process: Any) -> psutil.Process:
    [child] = psutil.Process(process.pid).children()
    return child


def test_each_server_sees_its_own_gpus(four_gpus: None, processes: None, tmp_path: Path) -> None:
    engine = VllmServer(server=ServerOptions(devices=[1, 2, 3]))
    engine.setup(tiny_model(12, seed=0), TOKENIZER, folder=tmp_path)
    try:
        engine.push(engine.weights(), 1)
        groups = engine.generate(prompts(6), Sampling(2, 4), np.arange(12).reshape(6, 2))
        assert [len(group) for group in groups] == [2] * 6
        assert engine.fleet is not None
        found = [server_of(one).environ() for one in engine.fleet.processes]
        assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["GPU-12ab34cd-1", "6", "7"]
        assert len({one["VLLM_API_KEY"] for one in found}) == 1 and found[0]["VLLM_API_KEY"]
        asked = [engine.fleet.loop.run(one._request("GET", "/seen"))["completions"] for one in engine.fleet.clients]
        assert asked == [4, 4, 4]
        assert sorted(one.name for one in tmp_path.iterdir()) == ["server.log", "server_1.log", "server_2.log"]
        lost, before = server_of(engine.fleet.processes[1]), [one.pid for one in engine.fleet.processes]
        lost.kill()
        lost.wait()
        engine.generate(prompts(3), Sampling(2, 4), np.arange(6).reshape(3, 2))
        assert not {one.pid for one in engine.fleet.processes} & set(before)
        after = [server_of(one).environ()["CUDA_VISIBLE_DEVICES"] for one in engine.fleet.processes]
        assert after == ["GPU-12ab34cd-1", "6", "7"]
        ends = [server_of(one) for one in engine.fleet.processes]
    finally:
        engine.close()
    assert not [one for one in ends if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_server_that_does_not_start_is_named(
    four_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: None
) -> None:
    right, first, failing = ServerOptions.command, free_port("127.0.0.1"), "raise SystemExit('no memory')"
    monkeypatch.setattr(
        ServerOptions,
        "command",
        lambda self, path, dtype, port: (
            right(self, path, dtype, port) if port == first else [sys.executable, "-c", failing]
        ),
    )
    engine = VllmServer(server=ServerOptions(devices=[1, 2], port=first))
    engine.setup(tiny_model(12, seed=0), TOKENIZER, folder=tmp_path)
    with pytest.raises(EngineError, match=r"did not start\. Its log ends: no memory"):
        engine.push(engine.weights(), 1)
    engine.close()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StandIn, StandIn]]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with stand_in() as first, stand_in() as second:
        yield first, second


def test_prompts_go_to_the_server_with_the_fewest_requests(pair: tuple[StandIn, StandIn]) -> None:
    """The first server answers its first request last: it gets two prompts, and the other one the remaining six."""
    slow, fast = pair
    others = threading.Event()

    def last(asked: Asked) -> Written:
        if fast.completions == 6:
            others.set()
        others.wait(20)
        return fives(asked)

    def notice(asked: Asked) -> Written:
        if fast.completions == 6:
            others.set()
        return fives(asked)

    slow.write, fast.write = last, notice
    engine = VllmServer(url=[slow.url, fast.url], max_concurrency=2)
    engine.setup(tiny_model(12, seed=0), TOKENIZER)
    try:
        engine.push(engine.weights(), 1)
        groups = engine.generate(prompts(8), Sampling(1, 4), np.arange(8).reshape(8, 1))
    finally:
        engine.close()
    assert others.is_set() and len(groups) == 8
    assert [one.completions for one in pair] == [2, 6]


@pytest.mark.parametrize(("gpus", "dtype", "sequences"), [(0, torch.float32, 256), (1, torch.bfloat16, 512)])
def test_defaults_on_gpus(gpus: int, dtype: torch.dtype, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    server, name = ServerOptions(), str(dtype).removeprefix("torch.")
    assert server.served_dtype(torch.float32) == dtype
    assert server.served_dtype(torch.float16) == torch.float16
    assert ServerOptions(dtype="float32").served_dtype(torch.bfloat16) == torch.float32
    command = server.command("policy", torch.float32, 8000)
    assert command[command.index("--dtype") + 1] == name
    assert command[command.index("--max-num-seqs") + 1] == str(sequences)
    assert FleetOptions().concurrency == sequences
    assert FleetOptions(server=ServerOptions(max_num_seqs=8)).concurrency == 8
    assert FleetOptions(max_concurrency=5).concurrency == 5
