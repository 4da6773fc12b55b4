"""The number of kernels per layer, which decides how fast a GPU decodes; see `tests/benchmarks/kernels.py`."""

from tests.benchmarks.kernels import kernels


def test_kernels_per_layer() -> None:
    found = {phase: counted.total() for phase, counted in kernels(mixed=True).items()}
    assert found["decode, shared prompts"] <= 30
    assert found["decode, own cache"] <= 30
    # Twelve of these add to the gradients of the micro-batch before.
    assert found["update, checkpointed"] <= 110
    assert found["update, shared prompts"] <= 110


def test_the_counter_counts_what_transformers_does() -> None:
    """Worked out from the operators of Qwen2's layer and of `SharedKeys.attend`, on a CPU in float32."""
    found = kernels(mixed=False)["decode, shared prompts"]
    products, norms, rotation, residuals, gated, cache = 7, 2 * 6, 2 * 5, 2, 2, 2
    # Scale, to prompts, two products, to rows, join, mask, softmax, to prompts, product, to rows, product and sum.
    attention = 12
    assert found.total() == products + norms + rotation + residuals + gated + cache + attention
