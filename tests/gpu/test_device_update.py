"""Memory, speed and kernels of an update on the device."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from app.objective.logprobs import CPU_TILE_BYTES, DEVICE_TILE_BYTES
from app.objective.packing import collate, pack
from app.policy.fused_layers import fuse_layers
from app.policy.scoring import completion_logprobs
from app.reporting import memory
from app.reporting.memory import DecoderShape, MicroBatch, Precision
from app.update.microbatches import MicroBatches
from app.update.optimization import Optimization
from datamodules.ledger import Ledger
from tests.gpu.conftest import Measured
from tests.gpu.shapes import large, mixed, on_gpu, peak, plain, qwen, relative, seconds, sequences

KERNELS = {"flash": "flash_attention", "efficient": "efficient_attention", "cudnn": "cudnn_attention", "math": "math"}


def _held(work: Callable[[], object]) -> int:
    """Return the most bytes that `work` held on the device; on a CPU those of NumPy, which makes the tensors there."""
    if on_gpu():
        return peak(work)
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_rates_of_the_machine(device: torch.device, measured: Measured) -> None:
    """Matrix products and copies, which the other figures are to be compared with; right whatever their speed."""
    size = 8192 if on_gpu() else 64
    torch.manual_seed(0)
    first, second = torch.randn(2, size, size, device=device).bfloat16()
    product = first @ second
    assert relative(product[:8], first[:8].double() @ second.double()) < 2**-8
    measured(bfloat16_tflops=2 * size**3 / seconds(lambda: first @ second) / 1e12)
    hidden, weight = torch.randn(4096, size // 8, device=device), torch.randn(4096, size // 8, device=device)
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            logits = (hidden @ weight.T)[:8]
            spent = seconds(lambda: hidden @ weight.T)
        finally:
            torch.set_float32_matmul_precision("highest")
        within = 1e-5 if precision == "highest" or not on_gpu() else 1e-2
        assert relative(logits, hidden[:8].double() @ weight.T.double()) < within
        measured(**{f"float32_{precision}_tflops": 2 * 4096**2 * (size // 8) / spent / 1e12})
    block = torch.empty(2**31 if on_gpu() else 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    measured(copy_gb_per_second=2 * block.numel() / seconds(lambda: other.copy_(block)) / 1e9)


@pytest.mark.long
@pytest.mark.parametrize("way", ["shared prompts", "checkpointing"])
def test_an_update_holds_what_describe_says(device: torch.device, way: str, measured: Measured) -> None:
    checkpointing = way == "checkpointing"
    sizes = {} if on_gpu() else {"hidden": 192, "intermediate": 512, "heads": 6, "vocabulary": 4000}
    model = (large if on_gpu() else qwen)(checkpointing=checkpointing, **sizes)
    numbers = Precision(4, 2, autocast=True)
    fuse_layers(model)
    shape = DecoderShape.of(model).on(device.type, numbers)
    prompt, completion, rows = (128, 896, 16) if on_gpu() else (64, 128, 8)
    prompts = rows if checkpointing else rows // 8
    plan = MicroBatch(prompts, rows, prompt, completion, not checkpointing, checkpointing)
    some = sequences(rows // 8, 8, prompt, completion, shape.vocabulary)
    batch = (collate if checkpointing else pack)(some, device=device)

    def update() -> None:
        with mixed(device):
            logprobs, _ = completion_logprobs(model, batch, 1.0, with_entropy=True)
        logprobs.sum().backward()

    update()  # gradients exist
    held = peak(update)
    tile = DEVICE_TILE_BYTES if on_gpu() else CPU_TILE_BYTES
    estimate = memory.update_peak(shape, numbers, plan, tile)
    spent = seconds(update)
    flops = 6 * (shape.layers * shape.layer_matrices * plan.positions + shape.vocabulary * shape.hidden * plan.targets)
    measured(ms=1e3 * spent, model_tflops=flops / spent / 1e12, peak_gib=held / 2**30, estimate=estimate / held)
    assert 0.75 < estimate / held < 1.3


@pytest.mark.parametrize("way", ["rectangle, bf16-mixed", "shared prompts, bf16-mixed", "rectangle, float32"])
def test_attention_is_fused(device: torch.device, way: str, measured: Measured) -> None:
    model = qwen(layers=1, hidden=896 if on_gpu() else 64, heads=14 if on_gpu() else 4, vocabulary=2000)
    some = sequences(1, 4, 128, 1024 if on_gpu() else 64, 2000)
    batch = (pack if way.startswith("shared") else collate)(some, device=device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    with profile(activities=activities) as seen:
        with plain() if way.endswith("float32") else mixed(device):
            logprobs, _ = completion_logprobs(model, batch, 1.0, with_entropy=False)
        logprobs.sum().backward()
    names = {event.key for event in seen.key_averages() if "dot_product" in event.key or "_attention" in event.key}
    reached = sorted(kind for kind, sign in KERNELS.items() if any(sign in name for name in names))
    measured(kernels="+".join(reached))
    assert reached, names
    assert "math" not in reached


def test_micro_batches_are_made_one_at_a_time(device: torch.device, measured: Measured) -> None:
    groups, completion = (4, 3072) if on_gpu() else (4, 256)
    some = sequences(groups, 8, 200, completion, 1000)
    layout = MicroBatches(qwen(), 8 * (completion + 200), True, 0, device)

    def all_of_them() -> None:
        assert sum(len(set(packed.sequences.tolist())) for packed in layout.of(some)) == len(some)

    one, held = _held(lambda: layout.one(some[:8])), _held(all_of_them)
    measured(one_mib=one / 2**20, all_mib=held / 2**20, ms=1e3 * seconds(all_of_them, 1) / groups)
    assert held < 2 * one


def test_work_counts_for_the_phase_that_launched_it(device: torch.device, measured: Measured) -> None:
    matrix = torch.randn(*((8192,) * 2 if on_gpu() else (1024,) * 2), device=device)
    matrix @ matrix  # the first product loads what it needs
    ledger = Ledger()
    with ledger.phase("update"):
        for _ in range(10):
            matrix @ matrix
    with ledger.phase("sync"):  # by the host's clock, most of the time on a GPU
        if on_gpu():
            torch.cuda.synchronize()
    measured(update_ms=1e3 * ledger.seconds["update"], sync_ms=1e3 * ledger.seconds["sync"])
    assert ledger.seconds["update"] > 10 * ledger.seconds["sync"]


def test_an_optimizer_step_is_adamws(device: torch.device, measured: Measured) -> None:
    """Three steps of our optimizer against the formula of Loshchilov and Hutter (arXiv 1711.05101, algorithm 2)."""
    model = large()
    options = Optimization(learning_rate=1e-3, weight_decay=0.1)
    optimizer = options.optimizer(model)
    assert {group["fused"] for group in optimizer.param_groups} == {on_gpu() or None}
    watched = model.model.layers[0].mlp.up_proj.weight
    right = watched.detach().cpu().double()
    first = second = torch.zeros_like(right)
    for step in (1, 2, 3):
        for number, one in enumerate(model.parameters()):
            one.grad = torch.full_like(one, 1e-3 * step * (1 + number % 3))
        assert watched.grad is not None
        grad = watched.grad.cpu().double()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        right = right * (1 - 1e-3 * 0.1) - 1e-3 * change
    assert relative(watched, right) < 1e-6
    step_of: Any = optimizer.step
    measured(ms=1e3 * seconds(step_of), extra_gib=peak(step_of) / 2**30)
