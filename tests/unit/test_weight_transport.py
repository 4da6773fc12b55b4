"""How weights travel to vLLM servers, by what their workers report; CUDA's own calls are replaced, for want of GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.engines.requests import EngineError
from app.engines.server.client import ServerClient
from app.engines.server.loop_thread import LoopThread
from app.engines.wire import cuda_ipc, push
from app.engines.wire.chunks import TensorSpec, from_json, pack
from app.engines.wire.push import Transport, WeightPusher
from datamodules.errors import UserError
from tests.support.stand_in_server import StandIn, stand_in

HERE, ELSEWHERE = "aaaa", "bbbb"
WEIGHTS = {"a": torch.arange(6.0).view(2, 3) / 3, "b": torch.ones(40), "c": torch.arange(3)}


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as started:
        yield started


class Worker:
    """A stand-in's worker with a GPU: what it was called with, and what it read from its buffer."""

    def __init__(self, server: StandIn, gpu: str, dtype: str, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        self.called: list[str] = []
        self.read: dict[str, torch.Tensor] = {}
        buffers: list[torch.Tensor] = []

        def handles(self: cuda_ipc.MappedBuffers) -> str:
            buffers[:] = self._buffers.values()
            return "{}"

        def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> object:
            method = body["method"]
            self.called.append(method)
            if method == "dots_facts":
                return {"results": [json.dumps({"gpu": gpu, "dtype": dtype})]}
            if method == "dots_map" and fails:
                handler.send_error(500)
                return None
            if method == "dots_read":
                specs = from_json(body["kwargs"]["specs"])
                self.read |= dict(cuda_ipc.read_chunk(buffers[0], specs))
                buffers[0].fill_(255)  # what was read must not be the buffer itself
            return server.answer("/collective_rpc", body)

        server.spoiled["/collective_rpc"] = answer
        monkeypatch.setattr(push, "visible_gpus", lambda: {HERE: torch.device("cpu")})
        monkeypatch.setattr(cuda_ipc.MappedBuffers, "handles", handles)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def pushed(server: StandIn, transport: Transport, url: str | None = None) -> WeightPusher:
    loop = LoopThread()
    client = ServerClient(url or server.url, "", "KEY", 4, 10)
    try:
        pusher = WeightPusher(loop, [client], transport, "127.0.0.1", chunk_bytes=128)
        pusher.push(WEIGHTS.items(), 1)
        return pusher
    finally:
        loop.run(client.close())
        loop.close()


@pytest.mark.parametrize(
    ("gpu", "fails", "transport", "expected"),
    [
        (HERE, False, "auto", "cuda_ipc"),
        (HERE, False, "cuda_ipc", "cuda_ipc"),
        (HERE, False, "shared_memory", "shared_memory"),
        (HERE, True, "auto", "shared_memory"),
        (ELSEWHERE, False, "auto", "shared_memory"),
        ("", False, "auto", "shared_memory"),
    ],
)
def test_the_way_is_that_of_the_workers_gpus(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    gpu: str, fails: bool, transport: Transport, expected: str,
) -> None:  # fmt: skip
    worker = Worker(server, gpu, "float32", monkeypatch, fails)
    assert pushed(server, transport).transport == expected
    # Chunks of 128 bytes: "a", then "b" alone, which is larger than the buffer, then "c".
    if expected == "cuda_ipc":
        sent = ["dots_map", "dots_begin", "dots_read", "dots_map", "dots_read", "dots_read"]
        assert all(torch.equal(worker.read[name], tensor) for name, tensor in WEIGHTS.items())
    else:
        sent = [*(["dots_map"] if fails else []), "dots_begin", *["dots_load_file"] * 3]
        assert server.weights == 3
    assert worker.called == ["dots_facts", *sent, "dots_finish", "dots_version"]
    assert ("CUDA IPC failed" in capsys.readouterr().err) == fails


def test_weights_are_sent_in_the_dtype_of_the_workers(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(server, HERE, "bfloat16", monkeypatch, fails=False)
    pushed(server, "auto")
    assert worker.called.count("dots_read") == 1  # 12 + 80 + 24 bytes, each at a multiple of 64
    for name, dtype in (("a", torch.bfloat16), ("b", torch.bfloat16), ("c", torch.int64)):
        assert worker.read[name].dtype == dtype
        assert torch.equal(worker.read[name], WEIGHTS[name].to(dtype))


def test_cuda_ipc_where_it_cannot_be_is_refused(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    Worker(server, ELSEWHERE, "float32", monkeypatch, fails=False)
    with pytest.raises(UserError, match=r"transport is cuda_ipc, but not every server .* Set it to auto"):
        pushed(server, "cuda_ipc")
    Worker(server, HERE, "float32", monkeypatch, fails=True)
    with pytest.raises(EngineError, match=r"CUDA IPC does not work here \(dots_map failed"):
        pushed(server, "cuda_ipc")


def test_a_handle_reaches_the_worker_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer sees two GPUs, the worker the second of them alone, as its first."""
    gpus = {torch.device("cuda", 0): "aaaa", torch.device("cuda", 1): "bbbb"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=gpus[device]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cuda_ipc.visible_gpus() == {"aaaa": torch.device("cuda", 0), "bbbb": torch.device("cuda", 1)}
    buffers = cuda_ipc.MappedBuffers({"bbbb": torch.device("cpu")}, 64)
    memory = (b"\x00handle\xff", 64, 1024, False, b"\x01counter", 7, b"\x02event", True)
    about = (torch.Tensor, (64,), (1,), 0, torch.storage.TypedStorage, torch.uint8)
    monkeypatch.setattr(cuda_ipc, "reduce_tensor", lambda buffer: (None, (*about, 1, *memory)))
    monkeypatch.setattr(cuda_ipc, "rebuild_cuda_tensor", lambda *arguments: arguments)
    text = buffers.handles()
    gpus[torch.device("cuda", 0)] = "bbbb"
    assert cuda_ipc.map_buffer(text, torch.device("cuda", 0)) == (*about, 0, *memory)
    gpus[torch.device("cuda", 0)] = "cccc"
    with pytest.raises(KeyError):
        cuda_ipc.map_buffer(text, torch.device("cuda", 0))


def test_a_chunk_is_read_into_memory_of_its_own() -> None:
    chunk = [("a", WEIGHTS["a"]), ("c", WEIGHTS["c"])]
    buffer = torch.zeros(256, dtype=torch.uint8)
    pack(chunk, buffer)
    found = dict(cuda_ipc.read_chunk(buffer, [TensorSpec.of(*one) for one in chunk]))
    buffer.zero_()
    assert torch.equal(found["a"], WEIGHTS["a"]) and torch.equal(found["c"], WEIGHTS["c"])
