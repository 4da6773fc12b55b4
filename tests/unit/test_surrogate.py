"""The clipped loss, its weights and its statistics against numbers worked by hand and a loop over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from app.objective.options import SurrogateOptions
from app.objective.ratios import AGGREGATIONS, kl_estimate, token_weights
from app.objective.statistics import Statistics
from app.objective.surrogate import PolicyLoss, policy_loss
from datamodules.errors import UserError

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def test_by_hand_around_the_old_policy() -> None:
    # mu = 0.5 everywhere. pi_old: 0.5, 0.25, 0.5, 1 -> rho_old 1, 1/2, 1, 2 -> with cap 1.5: 1, 1/2, 1, 3/2.
    # w: 1.5, 1.1, 0.5, 0.9, A: 1, 2, -1, -1, range [0.8, 1.3]:
    #   1   * min(1.5, 1.3)    =  1.3     clipped high, no gradient
    #   1/2 * (1.1 * 2)        =  1.1
    #   1   * min(-0.5, -0.8)  = -0.8     clipped low, no gradient
    #   3/2 * (-0.9)           = -1.35
    # Sum 0.25, weights 1/4: loss -1/16. d loss / d log pi = -1/4 c w A: 0, -0.275, 0, 0.3375.
    old = tensor(0.5, 0.25, 0.5, 1.0).log()
    logprobs = (old + tensor(1.5, 1.1, 0.5, 0.9).log()).requires_grad_()
    options = SurrogateOptions(epsilon_low=0.2, epsilon_high=0.3, importance_cap=1.5)
    result = policy_loss(
        logprobs, torch.full((4,), 0.5, dtype=F64).log(), tensor(1, 2, -1, -1), tensor(*[0.25] * 4), options,
        old_logprobs=old,
    )  # fmt: skip
    result.loss.backward()
    torch.testing.assert_close(result.loss, torch.tensor(-1 / 16, dtype=F64))
    torch.testing.assert_close(logprobs.grad, tensor(0, -0.275, 0, 0.3375))
    metrics = result.statistics.metrics()
    expected = {
        "clip_ratio/low_mean": 1 / 4,
        "clip_ratio/high_mean": 1 / 4,
        "clip_ratio/region_mean": 1 / 2,
        "policy/ratio_mean": 1.0,
        "policy/ratio_max": 1.5,
        "policy/approx_kl": sum(w - 1 - math.log(w) for w in (1.5, 1.1, 0.5, 0.9)) / 4,
        "sampling/importance_sampling_ratio/min": 0.5,
        "sampling/importance_sampling_ratio/mean": 1.0,
        "sampling/importance_sampling_ratio/max": 1.5,
        "sampling/effective_sample_fraction": 16 / (4 * 4.5),
        "sampling/sampling_logp_difference/mean": math.log(2) / 2,
        "sampling/sampling_logp_difference/max": math.log(2),
    }
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_by_hand_around_the_behaviour_policy() -> None:
    # rho = pi / mu: 1.5, 1.1, 0.5, 0.9 with A 1, 2, -1, -1 and range [0.8, 1.2]: 1.2 + 2.2 - 0.8 - 0.9 = 1.7.
    behaviour = tensor(0.5, 0.25, 0.5, 0.9).log()
    logprobs = (behaviour + tensor(1.5, 1.1, 0.5, 0.9).log()).requires_grad_()
    options = SurrogateOptions(clip_center="behaviour", importance_cap=0.1)
    result = policy_loss(logprobs, behaviour, tensor(1, 2, -1, -1), torch.ones(4, dtype=F64), options)
    result.loss.backward()
    torch.testing.assert_close(result.loss, torch.tensor(-1.7, dtype=F64))
    torch.testing.assert_close(logprobs.grad, tensor(0, -2.2, 0, 0.9))
    # Nothing was updated since, and no weight is used: what is reported is pi_old / mu, not capped.
    metrics = result.statistics.metrics()
    assert metrics["policy/approx_kl"] == 0
    reported = [metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")]
    assert reported == pytest.approx([0.5, 1.0, 1.5])


def random_tokens(count: int = 200) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    logprobs = -3 * torch.rand(count, generator=generator, dtype=F64)
    old = logprobs + 0.3 * torch.randn(count, generator=generator, dtype=F64)
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "behaviour_logprobs": old + 0.6 * torch.randn(count, generator=generator, dtype=F64),
        "advantages": torch.randn(count, generator=generator, dtype=F64),
        "weights": torch.rand(count, generator=generator, dtype=F64),
        "reference_logprobs": logprobs.detach() + 0.2 * torch.randn(count, generator=generator, dtype=F64),
    }


def test_old_center_is_rho_clipped_around_rho_old() -> None:
    """The form in the paper's code: `min(rho A, clip(rho, rho_old (1 - eps), rho_old (1 + eps)) A)`, rho_old <= 2."""
    given = random_tokens()
    given.pop("reference_logprobs")
    result = policy_loss(**given, options=SurrogateOptions(epsilon_low=0.1, epsilon_high=0.25))
    total, capped = 0.0, 0
    columns = zip(*(v.tolist() for v in given.values()), strict=True)
    for logp, old, behaviour, advantage, weight in columns:
        rho_old = min(math.exp(old - behaviour), 2.0)
        capped += math.exp(old - behaviour) > 2
        rho = math.exp(logp - old) * rho_old
        clipped = min(max(rho, rho_old * 0.9), rho_old * 1.25)
        total -= weight * min(rho * advantage, clipped * advantage)
    assert capped > 5
    assert result.loss.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("center", ["old", "behaviour"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_same_gradient_for_any_split(center: Any, parts: int) -> None:
    given = random_tokens()
    options = SurrogateOptions(clip_center=center, beta=0.1)
    whole = policy_loss(**given, options=options)
    expected = torch.autograd.grad(whole.loss, given["logprobs"])[0]
    statistics = Statistics.empty()
    gradient = torch.zeros_like(expected)
    for part in torch.arange(200).tensor_split(parts):
        result = policy_loss(**{k: v[part] for k, v in given.items()}, options=options)
        gradient += torch.autograd.grad(result.loss, given["logprobs"])[0]
        statistics = statistics.merge(result.statistics)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.sums, whole.statistics.sums, rtol=1e-5, atol=1e-6)
    assert statistics.metrics() == pytest.approx(whole.statistics.metrics(), rel=1e-5)


def test_sequence_importance_truncated_and_masked() -> None:
    # Two sequences: log ratios (log 2, log 2) -> 4 and (log 1/2, log 3) -> 3/2; per token 2, 2, 1/2, 3. Cap 2.5.
    log_importance = tensor(2, 2, 0.5, 3).log()
    cases = {
        ("sequence", "truncate"): (2.5, 2.5, 1.5, 1.5),
        ("sequence", "mask"): (0, 0, 1.5, 1.5),
        ("token", "truncate"): (2, 2, 0.5, 2.5),
        ("token", "mask"): (2, 2, 0.5, 0),
    }
    for (level, mode), expected in cases.items():
        logprobs = torch.zeros(4, dtype=F64, requires_grad=True)
        options = SurrogateOptions(importance_cap=2.5, importance_level=level, importance_mode=mode)  # type: ignore
        ones = torch.ones(4, dtype=F64)
        indices = torch.tensor([0, 0, 1, 1])
        policy_loss(logprobs, -log_importance, ones, ones, options, sequences=indices).loss.backward()
        assert logprobs.grad is not None
        torch.testing.assert_close(-logprobs.grad, tensor(*expected))


def test_zero_advantage_and_absurd_ratios_stay_finite() -> None:
    logprobs = tensor(-1, -500, 0).requires_grad_()
    advantages = tensor(0, 1, -1)
    old = tensor(-3, -1, -500)
    result = policy_loss(
        logprobs, old - 400, advantages, torch.ones(3, dtype=F64), SurrogateOptions(), old_logprobs=old
    )
    result.loss.backward()
    assert torch.isfinite(result.loss)
    # No advantage: exactly none; beyond the bound of 20: none either.
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, 0, 0]
    # What is reported stays finite as well: log-ratios of 2, -499 and 500 are taken for 2, -20 and 20.
    metrics = result.statistics.metrics()
    exact = [math.expm1(x) - x for x in (2, -20, 20)]
    assert metrics["policy/approx_kl"] == pytest.approx(sum(exact) / 3, rel=1e-6)
    assert result.terms.ratio.tolist() == pytest.approx([math.exp(2), math.exp(-20), math.exp(20)])
    assert result.terms.log_update.tolist() == [2, -20, 20]
    assert result.terms.logp_difference.tolist() == [400, 400, 400]


def test_importance_around_the_behaviour_policy_stays_finite() -> None:
    zero = tensor(0, 0)
    options = SurrogateOptions(clip_center="behaviour")
    terms = policy_loss(zero, tensor(-1000, 1000), zero, zero, options).terms
    assert terms.importance.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


def test_a_weight_of_just_the_cap_is_not_masked() -> None:
    # On policy every weight is exactly 1.
    logprobs = tensor(-1, -2).requires_grad_()
    options = SurrogateOptions(importance_mode="mask", importance_cap=1)
    policy_loss(logprobs, logprobs.detach(), tensor(1, -3), tensor(1, 1), options).loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor(-1, 3))


def test_kl_and_entropy_by_hand() -> None:
    # x = log(ref / pi) = log 2: k1 = -log 2, k2 = log(2)^2 / 2, k3 = 2 - 1 - log 2; d k3 / d log pi = 1 - e^x = -1.
    pi, ref = tensor(0.25).log(), tensor(0.5).log()
    log2 = math.log(2)
    for name, value in {"k1": -log2, "k2": log2**2 / 2, "k3": 1 - log2}.items():
        assert float(kl_estimate(pi, ref, name)) == pytest.approx(value)  # type: ignore[arg-type]
    # Log-ratios are bounded here too: 99 and -99 are taken for 20 and -20.
    apart, bound = (tensor(-100, -1), tensor(-1, -100)), math.expm1(20)
    for name, values in {"k1": (-20, 20), "k2": (200, 200), "k3": (bound - 20, math.expm1(-20) + 20)}.items():
        assert kl_estimate(*apart, name).tolist() == pytest.approx(values)  # type: ignore[arg-type]
    logprobs, entropy = pi.clone().requires_grad_(), tensor(0.7).requires_grad_()
    zero = torch.zeros(1, dtype=F64)
    options = SurrogateOptions(beta=0.1, entropy_coef=0.01)
    result = policy_loss(logprobs, pi, zero, zero + 3, options, entropy=entropy, reference_logprobs=ref)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(3 * (0.1 * (1 - log2) - 0.01 * 0.7))
    torch.testing.assert_close(logprobs.grad, tensor(-0.3))
    torch.testing.assert_close(entropy.grad, tensor(-0.03))
    metrics = result.statistics.metrics()
    assert (metrics["kl"], metrics["entropy"]) == pytest.approx((1 - log2, 0.7), rel=1e-6)


def test_statistics_of_some_tokens() -> None:
    given = random_tokens()
    result = policy_loss(**given, options=SurrogateOptions())
    mask = torch.arange(200) % 3 == 0
    alone = policy_loss(**{k: v[mask] for k, v in given.items()}, options=SurrogateOptions())
    assert result.terms.statistics(mask).metrics() == pytest.approx(alone.statistics.metrics())
    assert result.terms.statistics(mask & ~mask).metrics() == {}


def test_token_weights_by_hand() -> None:
    lengths = torch.tensor([1, 3, 4])
    close = torch.testing.assert_close
    close(token_weights(lengths), torch.tensor([1 / 8] * 3))
    close(token_weights(lengths, "token"), torch.tensor([1 / 8] * 3))
    close(token_weights(lengths, "sequence"), torch.tensor([1 / 3, 1 / 9, 1 / 12]))
    close(token_weights(lengths, "constant", max_completion_length=5), torch.tensor([1 / 15] * 3))
    close(token_weights(lengths, "sequence_sum"), torch.tensor([1 / 3] * 3))
    close(token_weights(lengths, "token_sum"), torch.tensor([1.0] * 3))


def test_token_weights_of_little_and_of_nothing() -> None:
    one, none = torch.tensor([1.0], dtype=F64), torch.zeros(2, dtype=torch.int64)
    for aggregation in AGGREGATIONS:
        weights = token_weights(one, aggregation, max_completion_length=1)  # type: ignore[arg-type]
        assert (weights.tolist(), weights.dtype) == ([1], F64)
        empty = token_weights(none[:0], aggregation, max_completion_length=1)  # type: ignore[arg-type]
        assert (empty.tolist(), empty.dtype) == ([], torch.float32)
    # Nothing to divide by: without tokens no weight is ever used, but it must not be infinite.
    assert token_weights(none, "token").tolist() == [1, 1]
    assert token_weights(none, "sequence").tolist() == [1 / 2, 1 / 2]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(UserError, match=r"clip_center is 'new'.*old, behaviour"):
        SurrogateOptions(clip_center="new")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"epsilon_low is -0\.1; set it to a number in \[0, 1\]"):
        SurrogateOptions(epsilon_low=-0.1)
    choices = "token, sequence, constant, sequence_sum, token_sum"
    choice = f"aggregation is 'tokens'; expected one of {choices}: did you mean 'token'"
    with pytest.raises(UserError, match=choice):
        token_weights(torch.ones(1), "tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^aggregation 'constant' needs max_completion_length"):
        token_weights(torch.ones(1), "constant")
    one = torch.ones(1)

    def loss(options: SurrogateOptions, weights: Tensor = one) -> PolicyLoss:
        return policy_loss(one, one, one, weights, options)

    with pytest.raises(ValueError, match=r"^beta=0\.1 needs reference_logprobs"):
        loss(SurrogateOptions(beta=0.1))
    with pytest.raises(ValueError, match=r"^entropy_coef=0\.1 and top_entropy_quantile=1\.0 need entropy"):
        loss(SurrogateOptions(entropy_coef=0.1))
    levels = "^The loss with .*importance_level='sequence'.* needs the sequence index of every token"
    with pytest.raises(ValueError, match=levels):
        loss(SurrogateOptions(importance_level="sequence"))
    with pytest.raises(ValueError, match=r"^shapes \[.*\(2,\).*\]: expected all to be \[T\]"):
        loss(SurrogateOptions(), weights=torch.ones(2))
    square = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"\(1, 1\).*expected all to be \[T\]"):
        policy_loss(square, square, square, square, SurrogateOptions())


def test_the_share_of_a_sample_that_is_masked_away_is_0() -> None:
    # pi_old / mu = 4 everywhere is above the cap, and the weights become 0.
    old = tensor(-1, -2)
    options = SurrogateOptions(importance_mode="mask", importance_cap=2)
    result = policy_loss(old, old - math.log(4), tensor(1, -1), tensor(1, 1), options)
    metrics = result.statistics.metrics()
    assert result.loss == 0
    assert metrics["sampling/effective_sample_fraction"] == 0
    assert metrics["sampling/importance_sampling_ratio/max"] == 0


def test_statistics_of_nothing_stay_on_their_device() -> None:
    empty = Statistics.empty("meta")
    assert (empty.sums.device.type, empty.maxima.device.type) == ("meta", "meta")
    none = torch.empty(0, device="meta")
    statistics = policy_loss(none, none, none, none, SurrogateOptions()).statistics
    assert (statistics.sums.device.type, statistics.maxima.device.type) == ("meta", "meta")


@pytest.mark.parametrize("wrong", ["sequences", "entropy", *random_tokens(1)])
def test_a_tensor_of_another_length_is_refused(wrong: str) -> None:
    given = {**random_tokens(3), "sequences": torch.tensor([0, 0, 1]), "entropy": torch.ones(3)}
    given[wrong] = given[wrong][:2]
    with pytest.raises(ValueError, match=r"^shapes \[.*\(2,\).*\]: expected all to be \[T\]"):
        policy_loss(**given, options=SurrogateOptions())
