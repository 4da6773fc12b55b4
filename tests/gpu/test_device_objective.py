"""Log-probabilities, loss and gradients on the device against plain float64 arithmetic on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.objective.logprobs import HeadPrecision, token_logprobs
from app.objective.options import SurrogateOptions
from app.objective.packing import PackedBatch, collate, pack
from app.objective.surrogate import policy_loss
from app.policy.scoring import completion_logprobs
from datamodules.types import Prompt, RolloutGroup
from tests.benchmarks.head_precision import BITS, errors, peaked, through_head
from tests.gpu.conftest import Measured
from tests.gpu.shapes import mixed, on_gpu, peak, plain, qwen, relative, seconds, sequences
from tests.support.policies import gradient, group_of, module_on, tiny_model

FORMS: list[dict[str, Any]] = [
    {}, {"epsilon_high": 0.28, "dual_clip": 3.0}, {"form": "cispo"}, {"form": "sapo"},
    {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}, {"clip_center": "behaviour"},
    {"importance_level": "sequence", "importance_mode": "mask"}, {"beta": 0.1, "kl_corrected": True},
    {"entropy_coef": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 20.0, "scale": 0.5}])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2e-3)])
def test_the_head_in_tiles(device: torch.device, dtype: torch.dtype, within: float, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    given = (torch.randn(259, 64).to(dtype), (torch.randn(1003, 64) * 0.3).to(dtype))
    targets, factors = torch.randint(0, 1003, (259,)), torch.randn(2, 259, dtype=torch.float64)

    def leaves(like: torch.dtype, where: torch.device) -> list[Tensor]:
        return [one.to(where, like).requires_grad_() for one in given]

    hidden, weight = leaves(torch.float64, torch.device("cpu"))
    logits = hidden @ weight.T * options.get("scale", 1.0)
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    expected = torch.distributions.Categorical(logits=logits / options.get("temperature", 1.0))
    by_hand = torch.stack([expected.log_prob(targets), expected.entropy()])
    (by_hand * factors).sum().backward()
    tiled = leaves(dtype, device)
    found = token_logprobs(*tiled, targets.to(device), tile_bytes=64 * 1024, **options)
    both = torch.stack([one for one in found if one is not None])
    assert both.shape == (2, 259)
    assert both.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (both * factors.to(device)).sum().backward()
    torch.testing.assert_close(both.detach().cpu().double(), by_hand.detach(), rtol=within, atol=within)
    grads = [one.grad for one in (*tiled, hidden, weight)]
    assert relative(grads[0], grads[2]) < 10 * within
    assert relative(grads[1], grads[3]) < 10 * within


@pytest.mark.parametrize(("precision", "within"), [("float32", 1e-5), ("tf32", 2e-3), ("bfloat16", 1.6e-2)])
def test_the_head_in_less_than_float32(
    device: torch.device, precision: HeadPrecision, within: float, measured: Measured
) -> None:
    hidden, weight, targets = peaked(512, 20_003 if on_gpu() else 1003, 512 if on_gpu() else 64)
    leaves = [one.to(device).requires_grad_() for one in (hidden, weight)]
    before = torch.backends.cuda.matmul.fp32_precision

    def update() -> Tensor:
        logprobs, _ = token_logprobs(*leaves, targets.to(device), precision=precision)
        leaves[0].grad = leaves[1].grad = None
        signs = 1 - 2 * (torch.arange(len(targets), device=device) % 2)
        (signs * logprobs).mean().backward()
        return logprobs.detach()

    found = update().cpu(), *(one.grad.cpu() for one in leaves if one.grad is not None)
    mean, most, *gradients = errors(found, through_head(hidden, weight, targets))
    measured(ms=1e3 * seconds(update), logprob_mean=mean, logprob_max=most, gradients=max(gradients))
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert mean < within and max(gradients) < within
    if precision == "bfloat16":  # the rounding is there, and nothing more
        mean, *_ = errors(found, through_head(hidden, weight, targets, BITS["bfloat16"]))
        assert mean < 1e-5


def test_the_head_keeps_no_table_of_logits(device: torch.device, measured: Measured) -> None:
    tokens, vocabulary, width = (8192, 151_936, 1536) if on_gpu() else (2048, 8003, 32)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)

    def update() -> None:
        hidden.grad = weight.grad = None
        token_logprobs(hidden, weight, targets)[0].sum().backward()

    table, held = 4 * tokens * vocabulary, peak(update)
    spent = seconds(update, 2)
    measured(ms=1e3 * spent, tflops=8 * tokens * vocabulary * width / spent / 1e12, peak_mib=held / 2**20)
    gradients = 4 * width * (tokens + vocabulary)
    assert held - gradients < 0.35 * table


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_losses_in_float32(device: torch.device, form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logprobs = -3 * torch.rand(400, dtype=torch.float64)
    behaviour, old = logprobs + 0.3 * torch.randn(400), logprobs + 0.1 * torch.randn(400)
    advantages, weights = torch.randn(400).double(), torch.rand(400).double() / 400
    owners = torch.arange(400) // 20

    def run(where: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        def put(one: Tensor) -> Tensor:
            return one.to(where, dtype)

        leaf = put(logprobs).requires_grad_()
        found = policy_loss(
            leaf, put(behaviour), put(advantages), put(weights), SurrogateOptions(**form), old_logprobs=put(old),
            sequences=owners.to(where), entropy=-leaf, reference_logprobs=put(logprobs - 0.2),
        )  # fmt: skip
        found.loss.backward()
        assert leaf.grad is not None
        return found.loss.detach(), leaf.grad

    loss, grad = run(device, torch.float32)
    right_loss, right_grad = run(torch.device("cpu"), torch.float64)
    torch.testing.assert_close(loss.cpu().double(), right_loss, rtol=1e-4, atol=1e-6)
    assert relative(grad, right_grad) < 1e-4


def _groups() -> list[RolloutGroup]:
    draw = np.random.default_rng(1)
    made = []
    for number in range(4):
        prompt = Prompt(str(number), number, "", "", tuple(draw.integers(2, 40, 3 + number).tolist()), {})
        tokens = [tuple(draw.integers(2, 40, int(draw.integers(1, 9))).tolist()) for _ in range(4)]
        logprobs = [-3 * draw.random(len(ids)) for ids in tokens]
        rewards = [0.0, 1.0, *draw.integers(0, 2, 2).astype(float).tolist()]
        made.append(group_of(prompt, tokens, logprobs, rewards, "replay" if number == 3 else "fresh"))
    return made


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_of_a_batch(device: torch.device, parts: int, shared: bool) -> None:
    # The expected one: whole sequences in one micro-batch, on the CPU.
    right = gradient(module_on(tiny_model(64, 0), mini_batches=parts, share_prompts=False), _groups())
    module = module_on(tiny_model(64, 0), mini_batches=parts, share_prompts=shared, max_tokens_per_microbatch=40)
    module.to(device)
    assert module.device.type == device.type
    assert right.norm() > 0
    assert relative(gradient(module, _groups()), right) < 1e-6


@pytest.mark.parametrize("layout", [collate, pack], ids=["rectangle", "shared prompts"])
def test_a_policys_log_probabilities(device: torch.device, layout: Any, measured: Measured) -> None:
    some = sequences(3, 4, 37, 60, 1000)
    right_model = qwen(device="cpu", dtype=torch.float64)
    right = []
    for one in some:  # the model's own logits, one sequence at a time
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        logits = right_model(ids).logits[0, 36:-1].log_softmax(-1)
        right.append(logits.gather(1, ids[0, 37:, None])[:, 0])
    torch.cat(right).sum().backward()
    expected = torch.cat(right).detach()
    expected_grad = torch.cat([one.grad.flatten() for one in right_model.parameters() if one.grad is not None])
    model, batch = qwen(), layout(some, device=device)
    assert isinstance(batch, PackedBatch)
    for name, context in (("float32", plain()), ("mixed", mixed(device))):
        model.zero_grad()
        with context:
            found, _ = completion_logprobs(model, batch, 1.0, with_entropy=False)
        found.sum().backward()
        grad = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
        gap = float((found.detach().cpu() - expected).abs().max())
        measured(**{f"{name}_gap": gap, f"{name}_gradient": relative(grad, expected_grad)})
        assert gap < (2e-3 if name == "float32" else 0.2)
        assert relative(grad, expected_grad) < (1e-3 if name == "float32" else 0.1)
