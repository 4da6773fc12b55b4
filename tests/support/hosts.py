"""Hosts of this machine: network namespaces with addresses of their own, joined by a pair of virtual Ethernet devices.

What runs in one reaches the other only through its address: loopback, ports and interfaces are its own.
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
    """One namespace.

    Attributes:
        name: of the namespace.
        address: that the other host reaches it by.
        device: its end of the pair.
    """

    name: str
    address: str
    device: str

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], out: Path, err: Path
    ) -> subprocess.Popen[bytes]:
        """Runs a command on this host, in a session of its own.

        gloo is told the device: left alone it takes the address of the host's name, which here, as on many hosts, is
        that of the loopback device.
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
    """Two hosts that reach each other; skips the test where namespaces cannot be made."""
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
    """`torchrun ... -m app ARGUMENTS` on every host, one process each; what did not end by the time is killed."""
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
    """Kills a command of `Host.start` with what it has started, if it is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
