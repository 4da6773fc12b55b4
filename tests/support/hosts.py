"""Two hosts on this machine: network namespaces connected by a pair of virtual Ethernet devices.

Each has its own loopback device, ports and interfaces, and reaches the other only by its address.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import ROOT, Done


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        name: name of the namespace.
        address: address seen by the other host.
        device: name of its network device.
    """

    name: str
    address: str
    device: str

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], out: Path, err: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host, in a new session.

        gloo needs the device's name: by default it uses the address of the host's name, which here, as on many hosts,
        is that of the loopback device.
        """
        own = {"GLOO_SOCKET_IFNAME": self.device, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with out.open("wb") as stdout, err.open("wb") as stderr:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=ROOT, env={**os.environ, **own, **environment}, stdout=stdout, stderr=stderr,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts that reach each other. Skip the test where namespaces cannot be created."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command (iproute2)")
    mark = os.getpid() % 0xFFFF
    first, second = (Host(f"dots-{mark}-{n}", f"10.77.0.{n}", f"dv{mark:x}n{n}") for n in (1, 2))
    try:
        for host in (first, second):
            if subprocess.run(["ip", "netns", "add", host.name], capture_output=True).returncode:
                pytest.skip("this kernel lets no network namespace be made")
        _ip("link", "add", first.device, "netns", first.name, "type", "veth", "peer", "name", second.device, "netns",
            second.name)  # fmt: skip
        for host in (first, second):
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                _ip("-n", host.name, "link", "set", device, "up")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def torchrun(
    hosts: Sequence[Host], folder: Path, *arguments: str, timeout: float = 280, port: int = 29500
) -> list[Done]:
    """Run `torchrun ... -m app ARGUMENTS` with one process per host, and kill it after `timeout` seconds."""
    started = []
    for number, host in enumerate(hosts):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--nproc-per-node", "1",
            "--node-rank", str(number), "--master-addr", hosts[0].address, "--master-port", str(port), "-m", "app",
            *arguments,
        ]  # fmt: skip
        out, err = (folder / f"{kind}{number}" for kind in ("out", "err"))
        started.append((host.start(command, {}, out, err), out, err))
    deadline = time.monotonic() + timeout
    try:
        codes = [process.wait(max(1.0, deadline - time.monotonic())) for process, _, _ in started]
    finally:
        for process, _, _ in started:
            end(process)
    return [Done(code, out.read_text(), err.read_text()) for code, (_, out, err) in zip(codes, started, strict=True)]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command of `Host.start` and its children if it is still running."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
