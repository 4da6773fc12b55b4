"""Policies, batches and clocks for the tests on a device: toy sizes on a CPU, Qwen2.5-0.5B's shape on a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from app.objective.packing import ScoredSequence
from tests.support.allocations import peak_bytes

DEVICE = os.environ.get("DOTS_TEST_DEVICE", "cpu")


def on_gpu() -> bool:
    return DEVICE == "cuda"


def qwen(
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    vocabulary: int = 1000,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    device: str = DEVICE,
) -> Qwen2ForCausalLM:
    """Return a Qwen2 with two key-value heads, a tied head and the random weights of seed 0."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=8192,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(device, dtype).train()  # initialised on the CPU: the same on every device
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def large(**options: object) -> Qwen2ForCausalLM:
    """Return Qwen2.5-0.5B's shape on a GPU, a toy on a CPU."""
    sizes = {"layers": 24, "hidden": 896, "intermediate": 4864, "heads": 14, "vocabulary": 151_936} if on_gpu() else {}
    return qwen(**sizes, **options)  # type: ignore[arg-type]


def sequences(prompts: int, each: int, prompt: int, completion: int, vocabulary: int) -> list[ScoredSequence]:
    """Return completions with random tokens, advantage 1 and weight 1 over their length."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(5, vocabulary, prompt) for _ in range(prompts)]
    return [
        ScoredSequence(text, draw.integers(5, vocabulary, completion), np.full(completion, -2.0), 1.0, 1 / completion)
        for text in texts
        for _ in range(each)
    ]


def mixed(device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast of Lightning's bf16-mixed."""
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def plain() -> AbstractContextManager[object]:
    return nullcontext()


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of `expected`."""
    a, b = (one.detach().cpu().double().flatten() for one in (found, expected))
    return float((a - b).norm() / b.norm())


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the mean time of `work` after one call that is not counted."""
    work()
    _synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    _synchronize()
    return (time.perf_counter() - started) / repeats


def peak(work: Callable[[], object]) -> int:
    """Return the most bytes that `work` held at a time, above what there was before."""
    if not on_gpu():
        return peak_bytes(work)
    _synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    _synchronize()
    return torch.cuda.max_memory_allocated() - before


def _synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()
