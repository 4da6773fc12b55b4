"""What the vLLM engines share: requests out of prompts and seeds, completions out of answers. Needs no vLLM itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from app.engines.base import Sampling
from datamodules.errors import UserError
from datamodules.types import Completion, FinishReason

EXTENSION = "app.engines.worker.extension.PolicyWeights"
"""Mixed into vLLM's worker (`worker_extension_cls`): it takes the policy's weights."""

LOGPROBS_MODE = "processed_logprobs"
"""Log-probabilities after temperature, top-k and top-p; vLLM's default ones are of the raw logits."""

PREFIX_BLOCK = 32
"""Tokens per block of the key-value cache: what the prefix cache shares, and what the CPU kernels take."""

_LEAST_TEMPERATURE = 0.01

# Each was measured on 0.32.0: usage reports leave the machine, and compiling one log-probability kernel costs 8 to 24
# seconds of every start on a CPU.
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU = {"TORCHDYNAMO_DISABLE": "1"}


class EngineError(UserError):
    """An engine that cannot go on (its process died, or a push failed): one line that says what to do."""


def engine_environment(on_cpu: bool, cache_gib: float | None = None, workers: int = 1) -> dict[str, str]:
    """Environment variables that vLLM reads when it is imported and started.

    Args:
        on_cpu: the CPU build.
        cache_gib: memory of the key-value cache on a CPU, in GiB, of which vLLM reads whole ones; None where the
            engine is told otherwise (on a GPU its share of the memory decides).
        workers: that one copy of the policy is cut over.
    """
    cache = {} if cache_gib is None else {"VLLM_CPU_KVCACHE_SPACE": str(max(1, round(cache_gib)))}
    # It would bind each worker to a memory node of its own, and refuses to start where there are fewer.
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if workers > 1 else {}
    return _QUIET | (_CPU | cache | threads if on_cpu else {})


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables that the user has not set, and takes them back."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def request_fields(sampling: Sampling, end_ids: np.ndarray, seed: int) -> dict[str, Any]:
    """One sample's settings, under the names that vLLM's `SamplingParams` and its HTTP interface share.

    One request per sample, with the sample's own seed. A request for `G` samples at once is split by vLLM itself into
    `G` requests with the seeds s, s + 1, ..., so that neighbouring seeds of two prompts overlap; asking one by one
    costs what the splitting costs, and the prefix cache reads a prompt's full blocks once either way.

    Args:
        sampling: the distribution; greedy ignores the seed.
        end_ids: int64: the tokens that end a completion. They are passed and vLLM's own are switched off, so that both
            engines end completions alike.
        seed: of the sample, in [0, 2**63).
    """
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
        raise UserError(
            f"sampling.temperature={sampling.temperature}: vLLM raises it to {_LEAST_TEMPERATURE}; "
            "set 0 (greedy) or at least that"
        )
    return {
        "n": 1,
        "seed": int(seed),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_completion_length,
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
    """What an engine returned for one sample.

    Attributes:
        token_ids: `T` tokens, the end token and those of a stop string included.
        logprobs: of the tokens, under the distribution sampled from.
        finish_reason: vLLM's word: "stop" or "length", else the request came to nothing.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None


def completions_of(
    answers: Sequence[Answer], sampling: Sampling, tokenizer: PreTrainedTokenizerBase, version: int
) -> list[tuple[Completion, ...]]:
    """Groups of `G` completions from `B * G` answers, sample by sample within prompts.

    Raises:
        EngineError: an answer is missing or incomplete.
        FloatingPointError: a log-probability is NaN or infinite: so are the policy's logits.
    """
    group = sampling.num_generations
    if len(answers) % group:
        raise EngineError(f"vLLM returned {len(answers)} completions, expected a multiple of {group}: see its log")
    texts = tokenizer.batch_decode([list(answer.token_ids) for answer in answers], skip_special_tokens=True)
    completions = [_completion(answer, text, sampling, version) for answer, text in zip(answers, texts, strict=True)]
    return [tuple(completions[start : start + group]) for start in range(0, len(completions), group)]


def _completion(answer: Answer, text: str, sampling: Sampling, version: int) -> Completion:
    logprobs = np.array(answer.logprobs, dtype=np.float32)
    reason = _finish_reason(answer.finish_reason)
    if reason is None or not 0 < len(answer.token_ids) == len(logprobs) <= sampling.max_completion_length:
        raise EngineError(
            f"vLLM ended a completion as {answer.finish_reason!r} with {len(answer.token_ids)} tokens and "
            f"{len(logprobs)} log-probabilities: expected as many of each, and 'stop' or 'length'; see its log"
        )
    if not np.isfinite(logprobs).all():
        raise FloatingPointError(
            f"the policy's logits are NaN or infinite (version {version}): "
            "its weights have diverged or its dtype overflows"
        )
    if sampling.temperature == 0:
        # vLLM gives the full distribution's; a greedy draw is certain.
        logprobs[:] = 0
    return Completion(
        token_ids=np.array(answer.token_ids, dtype=np.int32),
        logprobs=logprobs,
        finish_reason=reason,
        policy_version=version,
        text=text,
    )


def _finish_reason(given: str | None) -> FinishReason | None:
    if given == "stop":
        return "stop"
    return "length" if given == "length" else None
