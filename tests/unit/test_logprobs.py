"""Tiled log-probabilities and entropy against the plain softmax."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.objective.logprobs import HeadPrecision, _add_product_, _product, _products, _tile_shape, token_logprobs
from app.objective.packing import ScoredSequence, collate
from app.policy.model import Policy
from app.policy.scoring import completion_logprobs, head_precision
from tests.benchmarks.head_precision import BITS, errors, heads, peaked, rounded, through_head
from tests.support.policies import TINY

ONE_TILE = 2**20
# Tiles of 8 numbers at float64 in which 23 tokens x 31 words leave ragged edges on both sides.
MANY_TILES = 64


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The whole table of logits at once, as a Hugging Face model would."""
    z = hidden @ weight.T * 1.0 if bias is None else hidden @ weight.T + bias
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    distribution = torch.distributions.Categorical(logits=z / temperature)
    return distribution.log_prob(targets), distribution.entropy()


def example(tokens: int = 23, words: int = 31, width: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(0, words, (tokens,), generator=generator)
    return {"hidden": leaf(tokens, width), "weight": leaf(words, width), "targets": targets, "bias": leaf(words)}


OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.6}, {"scale": 0.125}, {"softcap": 2.0}]
OPTIONS.append({"temperature": 1.7, "scale": 3.0, "softcap": 1.5})


def test_by_hand() -> None:
    # Logits 0, log 2, log 5 from one-hot hidden states: probabilities 1/8, 2/8, 5/8.
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], dtype=torch.float64)
    logprobs, entropy = token_logprobs(torch.ones(3, 1, dtype=torch.float64), weight, torch.tensor([0, 1, 2]))
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64)
    torch.testing.assert_close(logprobs, p.log())
    torch.testing.assert_close(entropy, -(p * p.log()).sum().expand(3))
    # Temperature 1/2 squares the odds: 1, 4, 25 of 30.
    logprobs, _ = token_logprobs(torch.ones(1, 1).double(), weight, torch.tensor([1]), temperature=0.5)
    torch.testing.assert_close(logprobs, torch.tensor([4 / 30], dtype=torch.float64).log())


@pytest.mark.parametrize("tile_bytes", [1, MANY_TILES, 1000, ONE_TILE])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_plain_formula(
    tile_bytes: int, options: dict[str, Any], with_bias: bool
) -> None:
    given = example()
    leaves = [given["hidden"], given["weight"]] + ([given["bias"]] if with_bias else [])
    if not with_bias:
        given.pop("bias")
    mix = torch.randn(2, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = plain(**given, **options)
    actual = token_logprobs(**given, **options, tile_bytes=tile_bytes)
    for factor in (mix, mix * torch.tensor([[1.0], [0.0]]), mix * torch.tensor([[0.0], [1.0]])):
        grads = []
        for logprobs, entropy in (expected, actual):
            assert entropy is not None
            loss = (factor[0] * logprobs).sum() + (factor[1] * entropy).sum()
            grads.append(torch.autograd.grad(loss, leaves, retain_graph=True))
        for there, here in zip(*grads, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tile_bytes", [MANY_TILES, ONE_TILE])
def test_each_output_alone(tile_bytes: int) -> None:
    """An output the loss does not use leaves the other's gradient as it was (a different path in the backward)."""
    given = example()
    leaves = [given["hidden"], given["weight"], given["bias"]]
    for output in (0, 1):
        factor = torch.linspace(-1, 1, 23, dtype=torch.float64)
        expected = torch.autograd.grad((plain(**given)[output] * factor).sum(), leaves)
        result = token_logprobs(**given, tile_bytes=tile_bytes)[output]
        assert result is not None
        torch.testing.assert_close(torch.autograd.grad((result * factor).sum(), leaves), expected)
    logprobs, nothing = token_logprobs(**given, with_entropy=False, tile_bytes=tile_bytes)
    assert nothing is None
    torch.testing.assert_close(logprobs, plain(**given)[0])
    torch.testing.assert_close(
        torch.autograd.grad(logprobs.sum(), leaves), torch.autograd.grad(plain(**given)[0].sum(), leaves)
    )


@pytest.mark.parametrize("tile_bytes", [MANY_TILES, ONE_TILE])
def test_gradcheck(tile_bytes: int) -> None:
    given = example(tokens=4, words=5, width=3)
    targets = given.pop("targets")

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = token_logprobs(
            hidden, weight, targets, bias, softcap=2.0, temperature=0.8, tile_bytes=tile_bytes
        )
        assert entropy is not None
        return logprobs, entropy

    assert torch.autograd.gradcheck(outputs, tuple(given.values()))


def test_temperature_and_scale_reach_the_gradient_whatever_their_ratio() -> None:
    given = example(tokens=4, words=5, width=3)
    leaves = [given["hidden"], given["weight"], given["bias"]]
    for options in ({"temperature": 0.5}, {"temperature": 2.0}, {"temperature": 0.5, "scale": 0.5}, {"scale": 4.0}):
        expected = torch.autograd.grad(plain(**given, **options)[0].sum(), leaves)
        actual = torch.autograd.grad(token_logprobs(**given, **options)[0].sum(), leaves)
        torch.testing.assert_close(actual, expected)


def test_tied_head_adds_both_gradients() -> None:
    """The same parameter embeds the input and scores the output."""
    inputs, targets = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([1, 4, 1, 5, 0])
    table = example()["weight"]
    expected = torch.autograd.grad(plain(torch.tanh(table[inputs]), table, targets)[0].sum(), table)
    actual = token_logprobs(torch.tanh(table[inputs]), table, targets, tile_bytes=MANY_TILES)[0]
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), table), expected)


def test_frozen_head_and_frozen_body() -> None:
    given = example()
    expected = torch.autograd.grad(plain(**given)[0].sum(), [given["hidden"], given["weight"]])
    for position, name in enumerate(("hidden", "weight")):
        frozen = {k: v.detach() if k != "targets" else v for k, v in given.items()}
        frozen[name] = given[name]
        logprobs, _ = token_logprobs(**frozen, tile_bytes=MANY_TILES)
        torch.testing.assert_close(torch.autograd.grad(logprobs.sum(), given[name])[0], expected[position])


@pytest.mark.parametrize("tile_bytes", [4, 16, ONE_TILE])
def test_extreme_logits(tile_bytes: int) -> None:
    """Logits of +-800, whose exponentials overflow float32, and a certain token, beside one of logits 0."""
    hidden = torch.tensor([[800.0], [0.0], [-800.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 2, 0]), tile_bytes=tile_bytes)
    assert entropy is not None
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -math.log(3), -1600.0]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(3), 0.0]))
    (logprobs + entropy).sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_bfloat16_is_summed_in_float32() -> None:
    """As exact as if the bfloat16 inputs were float32: logits themselves in bfloat16 would be wrong by 1e-2."""
    narrow = example(tokens=40, words=300, width=64, dtype=torch.bfloat16)
    wide = {k: v.detach().float().requires_grad_() if k != "targets" else v for k, v in narrow.items()}
    logprobs, entropy = token_logprobs(**narrow, tile_bytes=4000)
    expected, expected_entropy = plain(**wide)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    expected.sum().backward()
    for name in ("hidden", "weight", "bias"):
        # The gradient is rounded once, at the end: half a unit in the last of bfloat16's 8 bits.
        torch.testing.assert_close(narrow[name].grad.float(), wide[name].grad, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_the_wider_type_of_states_and_head_is_summed_in(wide: str) -> None:
    given = example()
    given.pop("bias")
    exact = {name: values.detach() for name, values in given.items()}
    narrow = "weight" if wide == "hidden" else "hidden"
    exact[narrow] = exact[narrow].float().double()
    logprobs, _ = token_logprobs(**{**exact, narrow: exact[narrow].float()})
    assert logprobs.dtype == torch.float64
    torch.testing.assert_close(logprobs, plain(**exact)[0], rtol=1e-11, atol=1e-12)


def test_autocast_does_not_round_the_logits() -> None:
    given = {k: v.detach() for k, v in example(dtype=torch.float32).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logprobs(**given)
    torch.testing.assert_close(inside, token_logprobs(**given), rtol=0, atol=0)


def test_autocast_does_not_round_the_gradients() -> None:
    given = example(dtype=torch.float32)
    leaves = [given["hidden"], given["weight"], given["bias"]]
    outside = torch.autograd.grad(token_logprobs(**given)[0].sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(token_logprobs(**given)[0].sum(), leaves)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_no_tokens_by_vocabulary_tensor() -> None:
    given = example(tokens=300, words=500, width=4, dtype=torch.float32)
    with LargestTensor() as seen:
        logprobs, entropy = token_logprobs(**given, tile_bytes=4 * 2500)
        assert entropy is not None
        (logprobs + entropy).sum().backward()
    # A tile has 2,500 numbers, the weight 2,000; all logits would be 150,000.
    assert 2000 <= seen.largest <= 2500


def test_no_tokens() -> None:
    given = example()
    weight = given["weight"]
    logprobs, entropy = token_logprobs(torch.zeros(0, 6).double(), weight, torch.zeros(0, dtype=torch.int64))
    assert entropy is not None
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_wrong_input_is_refused() -> None:
    given = {k: v.detach() for k, v in example().items()}
    for temperature in (0, -1):
        with pytest.raises(ValueError, match=f"^temperature={temperature}: expected above 0 "):
            token_logprobs(**given, temperature=temperature)
    for outside in (31, -1):
        targets = torch.full((23,), 5)
        targets[7] = outside
        low, high = min(outside, 5), max(outside, 5)
        with pytest.raises(ValueError, match=rf"^targets from {low} to {high}: expected 0 \.\. 30$"):
            token_logprobs(**{**given, "targets": targets})
    shapes = {
        r"^hidden \(22, 6\), weight \(31, 6\), targets \(23,\): expected": {"hidden": given["hidden"][:22]},
        r"hidden \(23, 5\)": {"hidden": given["hidden"][:, :5]},
        r"hidden \(23, 6, 1\)": {"hidden": given["hidden"][..., None]},
        r"weight \(31, 6, 1\)": {"weight": given["weight"][..., None]},
        r"targets \(23, 1\): expected \[T, H\], \[V, H\] and \[T\]": {"targets": given["targets"][:, None]},
    }
    for message, wrong in shapes.items():
        with pytest.raises(ValueError, match=message):
            token_logprobs(**{**given, **wrong})


def test_tiles_are_square_where_both_sides_are_large_and_fill_their_budget() -> None:
    # Of 2,500 numbers of 4 bytes: 50 x 50; beside a short side the other one takes what is left.
    assert _tile_shape(1000, 1000, 4, 10_000) == (50, 50)
    assert _tile_shape(10, 1000, 4, 10_000) == (10, 250)
    assert _tile_shape(1000, 10, 4, 10_000) == (250, 10)
    assert _tile_shape(20, 30, 4, 10_000) == (20, 30)
    # One number at least, also where nothing fits or there is nothing.
    assert _tile_shape(7, 7, 4, 3) == (1, 1)
    assert _tile_shape(0, 5, 4, 10_000) == (1, 5)


def test_rounding_by_hand() -> None:
    given = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, -(1 + 3 * 2**-11), 0.0, 3e-30], dtype=torch.float64)
    assert rounded(given, 8)[:4].tolist() == [1.0, 1 + 2**-6, 1.0, -1.0]  # ties to even
    assert rounded(given, 11)[:4].tolist() == [1 + 2**-8, 1 + 3 * 2**-8, 1.0, -(1 + 2**-9)]
    torch.testing.assert_close(rounded(given, 8), given.bfloat16().double(), rtol=0, atol=0)


def used(precision: HeadPrecision, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return what `through_head` returns, from the tiled head in float32."""
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logprobs, _ = token_logprobs(*leaves, targets, precision=precision, tile_bytes=2**15)
    signs = 1 - 2 * (torch.arange(64) % 2)
    return logprobs.detach(), *torch.autograd.grad((signs * logprobs).mean(), leaves)


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_bfloat16_head_reads_rounded_numbers_and_sums_in_float32(share: float) -> None:
    given = peaked(64, 2000, 64, share)
    mean, most, *gradients = errors(used("bfloat16", *given), through_head(*given, BITS["bfloat16"]))
    # Float32's sums put some gradients of logits on the other side of a tie.
    assert mean < 1e-6 and most < 1e-5 and max(gradients) < 3e-4


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_errors_of_each_precision(share: float) -> None:
    """Against float64; bf16-mixed layers alone are wrong by 1e-2 and more (docs/gpu.md)."""
    given = peaked(64, 2000, 64, share)
    found = heads(*given)
    for name, bound in {"float32": 1e-6, "tf32": 5e-4, "bfloat16": 4e-3}.items():
        mean, most, *gradients = found[name]
        assert mean < bound and most < 5 * bound and max(gradients) < 2 * bound
        assert name == "float32" or mean > bound / 100
    assert errors(used("bfloat16", *given), through_head(*given)) == pytest.approx(found["bfloat16"], rel=0.02)


def test_tf32_is_set_for_the_products_alone() -> None:
    """A CPU has no TF32: the setting is seen, and the values are those of float32."""
    seen: list[tuple[str, str]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
                seen.append((func._schema.name, torch.backends.cuda.matmul.fp32_precision))
            return func(*args, **(kwargs or {}))

    before, given = torch.backends.cuda.matmul.fp32_precision, peaked(64, 2000, 64, 0.9)
    assert before != "tf32"
    with Products():
        found = used("tf32", *given)
    assert {name for name, _ in seen} == {"aten::mm", "aten::addmm_"}  # forward, and gradients
    assert {setting for _, setting in seen} == {"tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == before
    for one, other in zip(found, used("float32", *given), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ZeroDivisionError), _products(torch.device("cpu"), "tf32"):
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_a_bfloat16_head_multiplies_bfloat16_on_a_gpu() -> None:
    """On fake tensors, which have a GPU's operators and no values: half-precision inputs, results in float32."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if "mm" in func._schema.name:
                seen.append((str(func), *(one.dtype for one in args[:2]), result.dtype))
            return result

    with FakeTensorMode(), Products():
        hidden = torch.zeros(40, 16, device="cuda", dtype=torch.bfloat16)
        weight = torch.zeros(300, 16, device="cuda", dtype=torch.bfloat16)
        bias, total = torch.zeros(300, device="cuda"), torch.zeros(300, 16, device="cuda")
        logits = _product(hidden, weight.T, bias)
        _add_product_(total, logits.bfloat16().T, hidden)
    assert logits.shape == (40, 300)
    assert seen == [("aten.mm.dtype", torch.bfloat16, torch.bfloat16, torch.float32)] * 2


def test_the_precision_of_a_policys_head() -> None:
    """Chosen by "auto": bfloat16 on a GPU whose layers compute in it. A choice is kept, on every device."""
    policy = Policy(str(TINY)).load()
    with FakeTensorMode():
        there, here = torch.zeros(1, device="cuda"), torch.zeros(1)
        assert head_precision(policy, there) == head_precision(policy, here) == "float32"
        assert head_precision(policy, there.bfloat16()) == "bfloat16"
        with mock.patch("torch.is_autocast_enabled", return_value=True):  # no GPU, no autocast for one
            for dtype, expected in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32")):
                with mock.patch("torch.get_autocast_dtype", return_value=dtype):
                    assert head_precision(policy, there) == expected
                    assert head_precision(policy, here) == "float32"

    sequence = ScoredSequence(range(1, 6), range(1, 9), [0.0] * 8, 1.0, 1.0)
    values = [
        completion_logprobs(Policy(str(TINY), head_precision=one).load(), collate([sequence]), 1.0, with_entropy=False)[
            0
        ]
        for one in ("auto", "float32", "bfloat16")
    ]
    assert torch.equal(values[0], values[1])
    assert 1e-5 < float((values[2] - values[0]).abs().max()) < 0.1
