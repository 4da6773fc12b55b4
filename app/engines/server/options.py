"""Options of vLLM servers: of one that `dots serve` or a run starts, and of all that a run generates with."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from app.engines.base import check_counts, check_options
from app.engines.requests import VllmOptions, default_sequences, engine_environment
from app.engines.server.endpoints import EndpointChoice
from app.engines.server.placement import VISIBLE
from app.engines.wire.push import Transport
from app.import_path import import_path
from datamodules.errors import UserError


@dataclass
class ServerOptions(VllmOptions):
    """Options of a vLLM server.

    Args:
        dtype: of the server's weights, which a push sends them in; "auto" is that of the policy's files, or bfloat16
            on CUDA where that is float32.
        gpu_memory_utilization: share of a GPU's memory that the server uses.
        tensor_parallel_size: number of GPUs (or CPU processes) that one copy of the policy is split over.
        devices: GPUs of the run's own servers, a server for each `tensor_parallel_size` of them: indices among those
            that the run sees (CUDA_VISIBLE_DEVICES), or UUIDs. Null starts one server, on GPUs that no training process
            uses if there are any.
        host: address to listen on; the default can only be reached from the same machine.
        port: port to listen on, the next ones for further servers; 0 picks free ones.
        threads: threads of each CPU worker; 0 leaves the choice to the environment.
        arguments: further flags of vLLM's server, passed unchanged.
    """

    gpu_memory_utilization: float = 0.5
    devices: list[int | str] | None = None
    cpu_cache_gib: float = 1.0
    host: str = "127.0.0.1"
    port: int = 0
    threads: int = 0
    arguments: list[str] = field(default_factory=list)

    option_prefix: ClassVar[str] = "server"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            "server",
            ("port", self.port, 0 <= self.port < 65536, "between 0 (a free one) and 65535"),
            ("threads", self.threads, self.threads >= 0, "0 (the environment's choice) or a positive number"),
        )

        if given := [one for one in self.arguments if len(one) > 4 and "--host".startswith(one.partition("=")[0])]:
            raise UserError(f"server.arguments has {given[0]}, which server.host is for. Set that instead.")

    def url(self, port: int) -> str:
        """Return the URL of a server on this host, whose address may be one of IPv6."""
        host = self.host or "localhost"  # "" listens on all addresses
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def served_dtype(self, policy_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a policy is served in. vLLM's own "auto" turns float32 into a 16-bit type anywhere."""
        halves = policy_dtype == torch.float32 and torch.cuda.is_available()
        return self.torch_dtype or (torch.bfloat16 if halves else policy_dtype)

    def command(self, policy_path: str, policy_dtype: torch.dtype, port: int) -> list[str]:
        """Return the command line of a server of the policy."""
        on_cpu = not torch.cuda.is_available()
        settings = {"model": policy_path, "host": self.host, "port": port}
        settings |= self.vllm_arguments(self.served_dtype(policy_dtype), on_cpu)
        if not on_cpu:
            settings["gpu_memory_utilization"] = self.gpu_memory_utilization
        # vLLM imports both by name.
        settings["worker_extension_cls"] = "app.engines.worker.extension.ServedPolicyWeights"
        settings["middleware"] = "app.engines.worker.guard.KeyGuard"
        # The endpoint for token ids, which the key guards like all others.
        settings["enable_scale_out"] = True
        # Not the `vllm` command: in the CPU build it fails, because it looks up a package named vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in settings.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", str(value)]
        return [*command, "--disable-uvicorn-access-log", *self.arguments]

    def environment(self, gpus: str | None = None) -> dict[str, str]:
        """Return the environment variables that a server needs in addition to this process's own.

        `gpus` is its CUDA_VISIBLE_DEVICES; None leaves that as it is here.
        """
        own = engine_environment(not torch.cuda.is_available(), self.cpu_cache_gib, self.tensor_parallel_size)
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        # The endpoints that load weights only exist in vLLM's development mode.
        # PYTHONSAFEPATH: `-m` would look in the working folder first.
        dev_mode = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": import_path(), "PYTHONSAFEPATH": "1"}
        placed = {} if gpus is None else {VISIBLE: gpus}
        return own | threads | placed | {"VLLM_LOGGING_LEVEL": "WARNING"} | dev_mode


@dataclass(eq=False)
class FleetOptions:
    """Options of an engine's servers.

    Args:
        url: URL of the server, or of several; null starts them.
        server: options of the run's own servers.
        api_key_variable: environment variable that holds the key; without one, the run's own servers get a random key.
        endpoint: where completions are requested; they are the same everywhere. "tokens" is vLLM's endpoint for token
            ids (/inference/v1/generate), which servers have with --enable-scale-out, and "completions" is
            /v1/completions; "auto" is the first where all servers have it and there are no stop strings, as a token
            costs least there.
        max_concurrency: maximum number of requests in flight per server, over all trainer processes; null is the number
            of completions that a server decodes together (`server.max_num_seqs`).
        request_timeout_s: maximum seconds per completion.
        start_timeout_s: maximum seconds until the run's own servers are healthy.
        wait_s: maximum seconds to wait for a server given by `url`, also after it was lost.
        max_restarts: number of lost servers within one step that the run tolerates.
        transport: how weights are sent: "cuda_ipc" through memory of the servers' GPUs and "shared_memory" to servers
            on this machine, "process_group" (gloo, or NCCL with CUDA) to others; "auto" takes the first that works.
        trainer_address: address of this machine as seen by the servers, for the process group.
        chunk_mib: size of the chunks that weights are sent in, which bounds the memory of a push.
    """

    url: list[str] | str | None = None
    server: ServerOptions = field(default_factory=ServerOptions)
    api_key_variable: str = "VLLM_API_KEY"
    endpoint: EndpointChoice = "auto"
    max_concurrency: int | None = None
    request_timeout_s: float = 3600.0
    start_timeout_s: float = 300.0
    wait_s: float = 300.0
    max_restarts: int = 3
    transport: Transport = "auto"
    trainer_address: str = "127.0.0.1"
    chunk_mib: int = 256

    def __post_init__(self) -> None:
        check_counts("engine", self, "max_concurrency", "chunk_mib")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"engine.url is {url} but must look like http://HOST:PORT. Add the scheme.")

    @property
    def concurrency(self) -> int:
        """Maximum number of requests in flight per server."""
        return self.max_concurrency or self.server.max_num_seqs or default_sequences(not torch.cuda.is_available())

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else list(self.url or [])


def shown(command: list[str], environment: Mapping[str, str]) -> str:
    """Return the command as typed into a shell. Keys are not included."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items() if not name.startswith("PYTHON")]
    return " ".join([*variables, shlex.join(command)])


def full_environment(extra: Mapping[str, str], key: str) -> dict[str, str]:
    """Return this process's environment plus `extra`, except for vLLM's variables that the user has already set."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    merged = {**os.environ, **extra, **kept, "VLLM_SERVER_DEV_MODE": "1"}
    return merged | ({"VLLM_API_KEY": key} if key else {})
