"""Count the kernels of a decoder layer, per decoded token and per micro-batch of an update.

    python -m tests.benchmarks.kernels
    TRITON_INTERPRET=1 python -m tests.benchmarks.kernels --liger   # besides those with Liger's kernels, if installed

On a GPU, small kernels cost their launch more than their work, so that their number says how far an eager model is from
its hardware. Here they are counted on a CPU: dispatched operators that are neither views nor allocations, of a layer of
Qwen2's kind (the difference between a model of three layers and one of two), and of Granite's, which is not fused.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from app.engines import Sampling, Transformers
from app.objective.packing import ScoredSequence, collate, pack
from app.policy.fused_layers import fuse_layers
from app.policy.liger import add_liger
from app.policy.modes import switch_off_dropout
from app.policy.scoring import completion_logprobs
from datamodules.types import Prompt

PHASES = ("decode, shared prompts", "decode, own cache", "update, checkpointed", "update, shared prompts")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in ALLOCATIONS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def one_operator(name: str, compute: Callable[..., Any], backward: Callable[..., Any] | None = None) -> Any:
    """Return a function that is one operator to `Operators`, and so is its backward pass."""
    made = torch.library.custom_op(f"dots_benchmark::{name}", compute, mutates_args=())
    if backward is not None:
        made.register_autograd(
            lambda ctx, grad: (*backward(*ctx.saved_tensors), None),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
        )
    return made


def _norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(states, weight.shape, weight, eps)


def _norm_backward(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(states), torch.zeros_like(weight)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(query), query.new_zeros(query.shape[1::-1], dtype=torch.float32)


def _attention_backward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


NORM = one_operator("rms_norm", _norm, one_operator("rms_norm_backward", _norm_backward))
ATTENTION = one_operator("attention", _attention)
ATTENTION_BACKWARD = one_operator("attention_backward", _attention_backward)


def one_kernel_norms() -> AbstractContextManager[object]:
    """Let `rms_norm` be one operator forward and one backward, which keeps input and weight, as it is on CUDA."""
    return mock.patch("torch.nn.functional.rms_norm", lambda states, shape, weight, eps: NORM(states, weight, eps))


def _launch(states: Tensor) -> Tensor:
    return states.new_zeros(())


LAUNCH = one_operator("liger", _launch)


@contextmanager
def launches_as_operators() -> Iterator[None]:
    """Let every launch of a Triton kernel be one operator, which fills what it is given with zeros."""
    from triton.runtime.interpreter import GridExecutor

    def launch(_: GridExecutor, *arguments: Any, **__: Any) -> None:
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        LAUNCH(tensors[0])
        with _disable_current_modes():
            for one in tensors:
                one.data.zero_()

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Let `rms_norm` and attention of variable length be one operator forward and one backward, as they are on CUDA.

    A CPU composes them of several. Their values are of no use here: nothing but operators may be read meanwhile.
    """
    patch, varlen = mock.patch, "app.objective.varlen_attention."
    with (
        one_kernel_norms(),
        patch(varlen + "_attention", lambda query, key, value, runs, scale: ATTENTION(query, key, value)),
        patch(varlen + "_gradients", lambda grad, *states: ATTENTION_BACKWARD(*states[:3])),
    ):
        yield


def policy(layers: int, family: str, with_liger: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    fuse_layers(model)
    if with_liger:
        add_liger(model)
    return model


def decode(model: PreTrainedModel, share_prompts: bool) -> Counter[str]:
    """Return the operators of one more token of all rows."""
    words = {str(number): number for number in range(65)}
    engine = Transformers(share_prompts=share_prompts)
    # The end token is one that the model does not have, so that no row ends before the others.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), eos_token="64")
    engine.setup(model, tokenizer)
    prompts = [Prompt(str(length), length, "", "", tuple(range(1, length)), {}) for length in (5, 8)]

    def operators(tokens: int) -> Counter[str]:
        with Operators() as counted:
            groups = engine.generate(prompts, Sampling(4, tokens), np.arange(8).reshape(2, 4))
        assert {len(one.token_ids) for group in groups for one in group} == {tokens}
        return counted.found

    longer = operators(6)
    longer.subtract(operators(5))
    return longer


def update(model: PreTrainedModel, shared: bool) -> Counter[str]:
    """Return the operators of the second micro-batch of an update, whose gradients are added to those of the first."""
    if not shared:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    switch_off_dropout(model)
    sequences = [ScoredSequence(range(1, 6), range(1, 2 + length), [0.0] * (1 + length), 1.0, 1.0) for length in (4, 7)]
    for _ in range(2):
        with Operators() as counted:
            packed = pack(sequences) if shared else collate(sequences)
            logprobs, _ = completion_logprobs(model, packed, 1.0, with_entropy=True)
            logprobs.sum().backward()
    return counted.found


def per_layer(
    run: Callable[[PreTrainedModel], Counter[str]], mixed: bool, family: str, with_liger: bool
) -> Counter[str]:
    """Return the operators that a layer adds, in float32 or under autocast to bfloat16 as Lightning sets it."""
    counts = []
    for layers in (3, 2):
        model = policy(layers, family, with_liger)
        precision = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if mixed else nullcontext()
        with precision, kernels_of_a_gpu(), launches_as_operators() if with_liger else nullcontext():
            counts.append(run(model))
    counts[0].subtract(counts[1])
    return +counts[0]


def kernels(mixed: bool, family: str = "qwen2", *, with_liger: bool = False) -> dict[str, Counter[str]]:
    """Return the operators of a layer in each of `PHASES`."""
    runs: list[Callable[[PreTrainedModel], Counter[str]]] = [
        lambda model: decode(model, share_prompts=True), lambda model: decode(model, share_prompts=False),
        lambda model: update(model, shared=False), lambda model: update(model, shared=True),
    ]  # fmt: skip
    return {phase: per_layer(run, mixed, family, with_liger) for phase, run in zip(PHASES, runs, strict=True)}


def main() -> None:
    ways = [False, True] if "--liger" in sys.argv else [False]
    counted = {
        f"{family}, {'bf16-mixed' if mixed else 'float32'}{', Liger' if with_liger else ''}": kernels(
            mixed, family, with_liger=with_liger
        )
        for family in ("qwen2", "granite") for mixed in (False, True) for with_liger in ways
    }  # fmt: skip
    print(f"{'kernels per layer':32}" + "".join(f"{phase:>25}" for phase in PHASES))
    for name, found in counted.items():
        cells = (f"{found[phase].total()} ({found[phase]['_to_copy']} casts)" for phase in PHASES)
        print(f"{name:32}" + "".join(f"{cell:>25}" for cell in cells))
    if "-v" in sys.argv:
        for name, found in counted.items():
            for phase in PHASES:
                print(f"\n{name}, {phase}: " + ", ".join(f"{one} {n}" for one, n in found[phase].most_common()))


if __name__ == "__main__":
    main()
