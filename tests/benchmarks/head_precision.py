"""Measure what `policy.head_precision` costs in accuracy, against float64.

    python -m tests.benchmarks.head_precision                              # heads of random and of peaked logits
    python -m tests.benchmarks.head_precision POLICY_FOLDER PROMPTS.jsonl  # a policy, on questions and answers

For a policy, the error of a bf16-mixed forward pass is shown beside: that of the layers, which no head takes back. TF32
is emulated by rounding what matrix products read to 11 significant bits; no CPU has it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS = {"float32": 24, "tf32": 11, "bfloat16": 8}
"""Significant bits of what the head's products read."""


def rounded(values: Tensor, bits: int) -> Tensor:
    """Round to a number of significant bits, to nearest and ties to even."""
    fraction, exponent = torch.frexp(values)
    return torch.ldexp((fraction * 2.0**bits).round(), exponent - bits)


class RoundedHead(torch.autograd.Function):
    """Logits of a head whose three products read rounded numbers and are summed in the type of the inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(rounded(hidden, bits), rounded(weight, bits))
        ctx.bits = bits
        return rounded(hidden, bits) @ rounded(weight, bits).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        grad = rounded(grad, ctx.bits)
        return grad @ weight, grad.T @ hidden, None


def through_head(hidden: Tensor, weight: Tensor, targets: Tensor, bits: int | None = None) -> tuple[Tensor, ...]:
    """Return log-probabilities `[T]` and the gradients of a policy loss for hidden states and weight, in float64.

    The loss weighs the tokens by 1 and -1 in turn, as advantages do.
    """
    hidden, weight = (one.detach().double().requires_grad_() for one in (hidden, weight))
    logits = hidden @ weight.T if bits is None else RoundedHead.apply(hidden, weight, bits)
    logprobs = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    signs = 1 - 2 * (torch.arange(len(targets)) % 2)
    return logprobs.detach(), *torch.autograd.grad((signs * logprobs).mean(), [hidden, weight])


def peaked(tokens: int, vocabulary: int, width: int, share: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states `[T, H]`, a head `[V, H]` and targets, most of which have a probability of about `share`.

    Entries of the head are spread by 0.02, as initialised ones are, and those of hidden states by about 2, as a trained
    last norm leaves them. Without `share` the logits are random.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.02
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    hidden = torch.randn(tokens, width, generator=generator) * 2
    if share:
        rows = weight[targets] / weight[targets].norm(dim=1, keepdim=True)
        others = torch.logsumexp(hidden @ weight.T, 1)
        wished = others + torch.log(torch.tensor(share / (1 - share)))
        hidden += rows * ((wished - (hidden * weight[targets]).sum(1)) / weight[targets].norm(dim=1))[:, None]
    return hidden, weight, targets


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Return the mean and maximal error of log-probabilities, and the relative errors of the gradients."""
    off = (found[0] - exact[0]).abs()
    relative = [float((one - other).norm() / other.norm()) for one, other in zip(found[1:], exact[1:], strict=True)]
    return [float(off.mean()), float(off.max()), *relative]


def heads(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, list[float]]:
    """Return `errors` of each precision, for given float32 hidden states."""
    exact = through_head(hidden, weight, targets)
    return {name: errors(through_head(hidden, weight, targets, bits), exact) for name, bits in BITS.items()}


def policies(folder: Path, texts: list[str], load: Callable[..., Any]) -> dict[str, list[float]]:
    """Return the mean and maximal error of log-probabilities of a policy's own layers and each head.

    All are against layers and head in float64.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    targets = torch.cat([row[0, 1:] for row in rows])

    def states(context: Any) -> Tensor:
        with torch.no_grad(), context:
            return torch.cat([model.base_model(input_ids=row).last_hidden_state[0, :-1] for row in rows])

    weight = model.get_output_embeddings().weight
    mixed = states(torch.autocast("cpu", torch.bfloat16, cache_enabled=False)).float()
    single = states(nullcontext())
    model.double()
    exact = through_head(states(nullcontext()), weight, targets)
    found = {f"float32 layers, {name} head": errors(through_head(single, weight, targets, bits), exact)
             for name, bits in BITS.items()}  # fmt: skip
    for name, bits in BITS.items():
        found[f"bf16-mixed layers, {name} head"] = errors(through_head(mixed, weight, targets, bits), exact)
    with torch.no_grad():  # as torch.autocast computes a head: logits too are rounded
        logits = rounded(rounded(mixed.double(), 8) @ rounded(weight.double(), 8).T, 8)
    logprobs = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    found["bf16-mixed layers, autocast's head"] = errors((logprobs,), exact[:1])
    return found


def show(title: str, table: dict[str, list[float]]) -> None:
    print(f"\n{title:38} log-prob mean       max   grad hidden   grad weight")
    for name, values in table.items():
        print(f"{name:38}" + "".join(f"{value:14.2e}" for value in values))


def main() -> None:
    if len(sys.argv) > 1:
        lines = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()[:4]
        texts = ["{question}\n{answer}".format(**json.loads(line)) for line in lines]
        load = AutoModelForCausalLM.from_pretrained
        show(sys.argv[1], policies(Path(sys.argv[1]), texts, lambda folder: load(folder, dtype=torch.float32)))
        return
    for share in (0.0, 0.9):
        title = f"{151_936:,} x 1,536, " + (f"targets at {share}" if share else "random")
        show(title, heads(*peaked(64, 151_936, 1_536, share)))


if __name__ == "__main__":
    main()
