"""`dots serve`: a vLLM server of a config's policy, for runs that name its url."""

from __future__ import annotations

import asyncio
import os
import time

from app.engines import VllmServer
from app.engines.requests import EngineError
from app.engines.server.client import ServerClient
from app.engines.server.options import ServerOptions, full_environment, shown
from app.engines.server.process import ServerProcess, free_port
from app.module import GRPOModule

_POLL_S = 0.25
_PROBE_S = 5.0


def serve(module: GRPOModule, host: str | None, port: int | None, start_timeout_s: float) -> None:
    """Run the server until it exits or Ctrl-C is pressed, and print the command that starts it.

    Raises EngineError when the server does not become healthy, or exits on its own.
    """
    engine = module.engine
    options = engine.options.server if isinstance(engine, VllmServer) else ServerOptions()
    options.host = host or options.host
    variable = engine.options.api_key_variable if isinstance(engine, VllmServer) else "VLLM_API_KEY"
    key = os.environ.get(variable, "")
    listening = port if port is not None else options.port or free_port(options.host)
    command = options.command(module.policy_path, module.policy.stored_dtype(), listening)
    print(shown(command, options.environment()), flush=True)
    started = time.monotonic()
    process = ServerProcess(command, full_environment(options.environment(), key), log=None)
    try:
        url = f"http://{options.host}:{listening}"
        _await_health(process, ServerClient(url, key, variable, 1, _PROBE_S), start_timeout_s)
        access = f"key in {variable}" if key else f"no key: set {variable} to require one"
        print(f"healthy after {time.monotonic() - started:.0f} s at {url} ({access}); Ctrl-C stops it", flush=True)
        while process.alive:
            time.sleep(_POLL_S)
        raise EngineError(f"the vLLM server at {url} exited. See its output above")
    except KeyboardInterrupt:
        print("stopping the server", flush=True)
    finally:
        process.close()


def _await_health(process: ServerProcess, client: ServerClient, limit: float) -> None:
    async def probe() -> bool:
        try:
            return await client.healthy()
        finally:
            await client.close()

    deadline = time.monotonic() + limit
    while not asyncio.run(probe()):
        if not process.alive:
            raise EngineError("the vLLM server did not start. See its output above")
        if time.monotonic() > deadline:
            raise EngineError(
                f"the vLLM server is not healthy after {limit:.0f} s. See its output above, or raise --start_timeout_s"
            )
        time.sleep(_POLL_S)
