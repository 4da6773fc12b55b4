"""Starts the tool servers of `verifiers` as forks of the environment's process, which has imported what they need.

`verifiers` starts a Python of its own for each server, and so for each conversation where tasks have tools. It imports
`verifiers` for seconds, and is waited for in steps of a second; a fork serves within a tenth of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import tempfile
from pathlib import Path

import mcp.server.mcpserver  # noqa: F401  (what servers import, so that no fork has to)
import numpy as np
import uvicorn  # noqa: F401
from verifiers.v1.errors import ToolsetError
from verifiers.v1.mcp import ServerBase, launch
from verifiers.v1.runtimes import Runtime

from datamodules.seeding import derive_seed

_start_in_runtime = launch.serve_in_runtime


async def serve_in_runtime(
    server: ServerBase, runtime: Runtime, *, exposed: bool, state_url: str | None = None, state_secret: str = ""
) -> int:
    """Start a server, and return its port once it answers, as the function of that name in `verifiers` does."""
    if runtime.type != "subprocess":
        return await _start_in_runtime(server, runtime, exposed=exposed, state_url=state_url, state_secret=state_secret)
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder, "port"), Path(folder, "log")
        environment = {
            "VF_CONFIG": server.config.model_dump_json(),
            "VF_STATE_URL": state_url or "",
            "VF_STATE_SECRET": state_secret,
            "MCP_PORT_FILE": str(port_file),
            "TMPDIR": str(runtime.info.id),
        }
        log.touch()
        process = _Fork(os.fork())
        if process.pid == 0:
            _serve(server, environment, str(runtime.info.id), str(log))
        try:
            while process.running():
                with contextlib.suppress(OSError, ValueError):
                    port = int(port_file.read_text())
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    runtime._background.append(process)  # ends with the runtime, like those that it starts itself
                    return port
                await asyncio.sleep(0.01)
        except BaseException:
            os.kill(process.pid, signal.SIGKILL)
            raise
        raise ToolsetError(f"the tool server {server.server_name!r} ended: {log.read_text()[-2000:]}")


launch.serve_in_runtime = serve_in_runtime

conversation_seed = 0
"""What Python's and NumPy's generators of the servers that are started next depend on."""


class _Fork:
    """A forked process, as runtimes handle those of asyncio."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def running(self) -> bool:
        if self.returncode is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.returncode = 0
        return self.returncode is None

    async def wait(self) -> None:
        while self.running():
            await asyncio.sleep(0.01)


def _serve(server: ServerBase, environment: dict[str, str], folder: str, log: str) -> None:
    """Serve in this process, a fork, and never return."""
    try:
        gc.freeze()  # what the parent has opened is closed below, not once more by the garbage collection
        os.setsid()  # runtimes end the group of a process
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.environ.update(environment)
        os.environ.pop("MCP_PORT", None)
        os.chdir(folder)
        seed = derive_seed("tool server", conversation_seed, server.server_name)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        type(server).run()
    except BaseException:  # noqa: BLE001 (the server's author's code may raise anything)
        import traceback

        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)
