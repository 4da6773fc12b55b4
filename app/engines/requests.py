"""What the vLLM engines share, without importing vLLM: options, requests, and completions from answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.engines.ahead import Groups
from app.engines.base import Sampling, check_counts, check_options, nonfinite_policy
from datamodules.errors import UserError
from datamodules.types import Completion, FinishReason

_PREFIX_BLOCK = 32
"""Tokens per block of the key-value cache: the unit of prefix caching, and a size that the CPU kernels support."""

_MIN_TEMPERATURE = 0.01
_MAX_LOGPROB = 0.01
"""Above 0 only by rounding."""
_FINISH_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}


class EngineError(UserError):
    """An engine failed and cannot continue, e.g. because its process died or a push failed."""


@dataclass(eq=False)
class VllmOptions:
    """Options of vLLM, in the trainer's process or in a server.

    Args:
        max_model_len: maximum number of tokens of a prompt and its completion together; null for the model's own limit.
        max_num_seqs: maximum number of completions decoded together; null is 512 on CUDA and 256 on a CPU.
        max_num_batched_tokens: maximum number of tokens in one forward pass; null lets vLLM choose.
        enable_prefix_caching: prefill a prompt's full blocks once for all its completions.
        block_size: tokens per block of the key-value cache; null is 32 on a CPU, and vLLM's choice on CUDA.
        cpu_cache_gib: memory of the key-value cache without a GPU.
        enforce_eager: disable CUDA graphs, for a faster start and slower decoding; null is false on CUDA. CPUs always
            run eagerly.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    block_size: int | None = None
    gpu_memory_utilization: float = 0.4
    cpu_cache_gib: float = 2.0
    tensor_parallel_size: int = 1
    enforce_eager: bool | None = None

    option_prefix: ClassVar[str] = "engine"

    def __post_init__(self) -> None:
        counts = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "tensor_parallel_size")
        check_counts(self.option_prefix, self, *counts)
        share = self.gpu_memory_utilization
        check_options(
            self.option_prefix,
            ("gpu_memory_utilization", share, 0 < share <= 1, "greater than 0 and at most 1"),
            ("cpu_cache_gib", self.cpu_cache_gib, self.cpu_cache_gib > 0, "greater than 0"),
        )

    def context_length(self, positions: int | None) -> int | None:
        """See `RolloutEngine.context_length`."""
        return self.max_model_len or positions

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype, or None for "auto"."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def vllm_arguments(self, dtype: torch.dtype, on_cpu: bool) -> dict[str, object]:
        """Return vLLM's keyword arguments, under names that its server's flags share."""
        arguments = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs or default_sequences(on_cpu),
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "enable_prefix_caching": self.enable_prefix_caching,
            "block_size": self.block_size or (_PREFIX_BLOCK if on_cpu else None),
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": on_cpu if self.enforce_eager is None else self.enforce_eager,
            # On a CPU, vLLM 0.32 crashes on chunked prefill of a seeded request: CPU generators cannot be reset.
            "enable_chunked_prefill": False if on_cpu else None,
            # Log-probabilities after temperature, top-k and top-p; vLLM's default is those of the raw logits.
            "logprobs_mode": "processed_logprobs",
            # The policy's own defaults (e.g. a top_p) are not part of the configured sampling.
            "generation_config": "vllm",
        }
        return {name: value for name, value in arguments.items() if value is not None}


def default_sequences(on_cpu: bool) -> int:
    """Return how many completions are decoded together by default."""
    return 256 if on_cpu else 512


def engine_environment(on_cpu: bool, cache_gib: float | None = None, workers: int = 1) -> dict[str, str]:
    """Return the environment variables that vLLM reads when it is imported and started.

    Args:
        on_cpu: True for the CPU build.
        cache_gib: memory of the key-value cache on a CPU, in GiB (vLLM only reads whole numbers); None if the size is
            set in another way (on a GPU its share of the memory decides).
        workers: number of workers that one copy of the policy is split over.
    """
    # Usage reports would leave the machine.
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if on_cpu:
        # Compiling one log-probability kernel would dominate the start-up time.
        variables["TORCHDYNAMO_DISABLE"] = "1"
        if cache_gib is not None:
            variables["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(cache_gib)))
        if workers > 1:
            # vLLM binds each worker to its own memory node, and refuses to start if there are fewer nodes.
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return variables


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set the variables that the user has not set, and remove them at the end."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def request_fields(sampling: Sampling, end_ids: np.ndarray, seed: int, limit: int | None = None) -> dict[str, object]:
    """Return the settings of one sample, under names shared by vLLM's `SamplingParams` and its HTTP interface.

    There is one request per sample, with the sample's own seed. vLLM splits a request for `G` samples into `G` requests
    with the seeds s, s + 1, ..., so nearby seeds of two prompts would overlap. Separate requests cost no more than the
    split, and the prefix cache reads a prompt's full blocks only once either way.

    Args:
        sampling: the distribution; greedy sampling ignores the seed.
        end_ids: int64: the tokens that end a completion. vLLM's own end tokens are switched off, so that all engines
            end completions alike.
        seed: the sample's seed, in [0, 2**63).
        limit: maximum number of tokens; None is `sampling.max_completion_length`.
    """
    if 0 < sampling.temperature < _MIN_TEMPERATURE:
        raise UserError(
            f"sampling.temperature is {sampling.temperature}, but vLLM raises it to {_MIN_TEMPERATURE}. "
            f"Set it to 0 (greedy) or at least {_MIN_TEMPERATURE}."
        )
    return {
        "n": 1,
        "seed": int(seed),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_completion_length if limit is None else int(limit),
        "stop": list(sampling.stop),
        "stop_token_ids": end_ids.tolist(),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        # A stop string may be the text of a special token.
        "skip_special_tokens": False,
        "logprobs": 0,
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """vLLM's answer for one sample of `T` tokens, including the end token and those of a stop string."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number of tokens that the policy has an embedding for, padding included."""
    rows: int = model.config.get_text_config(decoder=True).vocab_size
    return rows


def completions_of(
    answers: Sequence[Answer], sampling: Sampling, tokenizer: PreTrainedTokenizerBase, version: int, vocabulary: int
) -> Groups:
    """Build groups of `G` completions from `B * G` answers, which are ordered by prompt and then by sample.

    Args:
        answers: of the engine, which may be a server that is not the policy's.
        sampling: `G`, the maximum length and the temperature.
        tokenizer: decodes the tokens.
        version: of the policy that generated them.
        vocabulary: number of tokens that the policy has an embedding for.

    Raises:
        EngineError: an answer is missing or incomplete, or has a token or log-probability that the policy cannot give.
        FloatingPointError: a log-probability is NaN or infinite, and so are the policy's logits.
    """
    group = sampling.num_generations
    if len(answers) % group:
        raise EngineError(
            f"vLLM returned {len(answers)} completions instead of a multiple of {group}. See vLLM's log for the cause."
        )
    completions = []
    for answer in answers:
        logprobs = np.array(answer.logprobs, dtype=np.float32)
        reason = _FINISH_REASONS.get(answer.finish_reason)
        if reason is None or not 0 < len(answer.token_ids) == len(logprobs) <= sampling.max_completion_length:
            raise EngineError(
                f"vLLM finished a completion with reason {answer.finish_reason!r}, {len(answer.token_ids)} tokens and "
                f"{len(logprobs)} log-probabilities instead of 'stop' or 'length', and 1 to "
                f"{sampling.max_completion_length} of each. See vLLM's log for the cause."
            )
        if not 0 <= min(answer.token_ids) <= max(answer.token_ids) < vocabulary:
            raise EngineError(
                f"vLLM returned tokens from {min(answer.token_ids)} to {max(answer.token_ids)}, but the policy has the "
                f"tokens 0 to {vocabulary - 1}. Let it serve this policy."
            )
        if (highest := logprobs[~np.isnan(logprobs)].max(initial=-np.inf)) > _MAX_LOGPROB:
            raise EngineError(
                f"vLLM returned a log-probability of {highest:g}, but none is above 0. Let it serve this policy, with "
                "--logprobs-mode processed_logprobs."
            )
        if not np.isfinite(logprobs).all():
            raise nonfinite_policy(version)
        if sampling.temperature == 0:
            # vLLM reports the full distribution's log-probability, but a greedy draw is certain.
            logprobs[:] = 0
        token_ids = np.array(answer.token_ids, dtype=np.int32)
        text = tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        completions.append(Completion(token_ids, logprobs, reason, policy_version=version, text=text))
    return [tuple(completions[start : start + group]) for start in range(0, len(completions), group)]
