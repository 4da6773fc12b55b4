"""Options that start a vLLM server, for `dots serve` and for a server that a run owns."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from app.engines.requests import LOGPROBS_MODE, PREFIX_BLOCK, engine_environment
from app.engines.server.process import import_path
from datamodules.errors import UserError

# vLLM imports both by name.
EXTENSION = "app.engines.worker.extension.ServedPolicyWeights"
GUARD = "app.engines.worker.guard.KeyGuard"


@dataclass
class ServerOptions:
    """Options of a vLLM server.

    Args:
        host: address to listen on; the default can only be reached from the same machine.
        port: port to listen on; 0 picks a free one.
        dtype: of the server's weights; "auto" is the policy's own.
        max_model_len: maximum number of tokens of a prompt and its completion together; null for the model's own limit.
        max_num_seqs: maximum number of completions decoded together.
        max_num_batched_tokens: maximum number of tokens in one forward pass; null lets vLLM choose.
        enable_prefix_caching: prefill a prompt's full blocks once for all its completions.
        block_size: tokens per block of the key-value cache; null is 32 on a CPU, and vLLM's choice on CUDA.
        gpu_memory_utilization: share of a GPU's memory that the server uses.
        tensor_parallel_size: number of GPUs (or CPU processes) that one copy of the policy is split over.
        enforce_eager: disable CUDA graphs, for a faster start and slower decoding; null is false on CUDA. CPUs always
            run eagerly.
        cpu_cache_gib: memory of the key-value cache without a GPU.
        threads: threads of each CPU worker; 0 leaves the choice to the environment.
        arguments: further flags of vLLM's server, passed unchanged.
    """

    host: str = "127.0.0.1"
    port: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    block_size: int | None = None
    gpu_memory_utilization: float = 0.5
    tensor_parallel_size: int = 1
    enforce_eager: bool | None = None
    cpu_cache_gib: float = 1.0
    threads: int = 0
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        checks = [
            ("port", self.port, 0 <= self.port < 65536, "between 0 (a free one) and 65535"),
            ("max_num_seqs", self.max_num_seqs, self.max_num_seqs >= 1, "at least 1"),
            ("tensor_parallel_size", self.tensor_parallel_size, self.tensor_parallel_size >= 1, "at least 1"),
            ("gpu_memory_utilization", self.gpu_memory_utilization, 0 < self.gpu_memory_utilization <= 1, "in (0, 1]"),
            ("cpu_cache_gib", self.cpu_cache_gib, self.cpu_cache_gib > 0, "greater than 0"),
            ("threads", self.threads, self.threads >= 0, "0 (the environment's choice) or a positive number"),
        ]
        for name, given, valid, expected in checks:
            if not valid:
                raise UserError(f"server.{name} is {given} but must be {expected}. Change server.{name}.")

    def command(self, policy_path: str, policy_dtype: torch.dtype, port: int) -> list[str]:
        """Return the command line of a server of the policy."""
        on_cpu = not torch.cuda.is_available()
        # vLLM's own "auto" turns float32 into a 16-bit type.
        dtype = str(policy_dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        flags: dict[str, object] = {
            "--model": policy_path,
            "--host": self.host,
            "--port": port,
            "--dtype": dtype,
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--max-num-batched-tokens": self.max_num_batched_tokens,
            "--block-size": self.block_size or (PREFIX_BLOCK if on_cpu else None),
            "--tensor-parallel-size": self.tensor_parallel_size,
            "--gpu-memory-utilization": None if on_cpu else self.gpu_memory_utilization,
            "--logprobs-mode": LOGPROBS_MODE,
            # The policy's own defaults (e.g. a top_p) are not part of the configured sampling.
            "--generation-config": "vllm",
            "--worker-extension-cls": EXTENSION,
            "--middleware": GUARD,
        }
        given = [text for name, value in flags.items() if value is not None for text in (name, str(value))]
        switches = ["--enable-prefix-caching" if self.enable_prefix_caching else "--no-enable-prefix-caching"]
        eager = on_cpu if self.enforce_eager is None else self.enforce_eager
        switches += ["--enforce-eager"] if eager else []
        # On a CPU, vLLM 0.32 crashes on chunked prefill of a seeded request: CPU generators cannot be reset.
        switches += ["--no-enable-chunked-prefill"] if on_cpu else []
        # Not the `vllm` command: in the CPU build it fails, because it looks up a package named vllm.
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, *given, *switches, "--disable-uvicorn-access-log", *self.arguments]

    def environment(self) -> dict[str, str]:
        """Return the environment variables that the server needs in addition to this process's own."""
        own = engine_environment(not torch.cuda.is_available(), self.cpu_cache_gib, self.tensor_parallel_size)
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        # The endpoints that load weights only exist in vLLM's development mode.
        dev_mode = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": import_path()}
        return own | threads | {"VLLM_LOGGING_LEVEL": "WARNING"} | dev_mode


def shown(command: list[str], environment: Mapping[str, str]) -> str:
    """Return the command as typed into a shell. Keys are not included."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items() if name != "PYTHONPATH"]
    return " ".join([*variables, shlex.join(command)])


def full_environment(extra: Mapping[str, str], key: str) -> dict[str, str]:
    """Return this process's environment plus `extra`, except for vLLM's variables that the user has already set."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    merged = {**os.environ, **extra, **kept, "VLLM_SERVER_DEV_MODE": "1"}
    return merged | ({"VLLM_API_KEY": key} if key else {})
