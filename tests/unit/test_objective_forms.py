"""Every form of the surrogate, the sequence ratio and the corrected KL against numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from app.objective.forms import MovedTokens, capped_tokens, clipped_tokens
from app.objective.options import SurrogateOptions
from app.objective.ratios import kl_estimate
from app.objective.surrogate import policy_loss
from datamodules.errors import UserError

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def run(
    ratios: tuple[float, ...], advantages: tuple[float, ...], options: SurrogateOptions, **more: Any
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient in the log-probs and metrics of tokens of weight 1 whose policy moved by `ratios` since 1/2."""
    old = torch.full((len(ratios),), 0.5, dtype=F64).log()
    logprobs = (old + tensor(*ratios).log()).requires_grad_()
    weights = torch.ones(len(ratios), dtype=F64)
    result = policy_loss(logprobs, old, tensor(*advantages), weights, options, old_logprobs=old, **more)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    return float(result.loss.detach()), gradient, result.statistics.metrics()


def test_dual_clip() -> None:
    # c = 3, range [0.8, 1.2]. A = -1: ratio 2 -> -2, gradient; ratio 4 -> -3, none; ratio 0.5 -> -0.8, none.
    # A = +1: ratio 4 -> 1.2, none.
    loss, gradient, metrics = run((2, 4, 0.5, 4), (-1, -1, -1, 1), SurrogateOptions(dual_clip=3.0))
    assert loss == pytest.approx(2 + 3 + 0.8 - 1.2)
    torch.testing.assert_close(gradient, tensor(2, 0, 0, 0))
    assert metrics["clip_ratio/capped_mean"] == 1 / 4
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == (1 / 4, 1 / 4)


def test_cispo_keeps_the_gradient_of_every_token() -> None:
    # -min(w, 1.5) A log pi: pi = 0.5 w; the gradient is -min(w, 1.5) A, also where PPO's is 0.
    loss, gradient, metrics = run((1.4, 1.8, 0.2), (1, 2, -1), SurrogateOptions(form="cispo", cispo_cap=1.5))
    assert loss == pytest.approx(-(1.4 * math.log(0.7) + 1.5 * 2 * math.log(0.9) - 0.2 * math.log(0.1)))
    torch.testing.assert_close(gradient, tensor(-1.4, -3.0, 0.2))
    assert metrics["clip_ratio/capped_mean"] == pytest.approx(1 / 3)
    assert metrics["clip_ratio/region_mean"] == 0


def test_sapo_fades_smoothly() -> None:
    # s = sigmoid(tau (w - 1)): value 4 s / tau, slope in w 4 s (1 - s), in log pi w times it. At w = 1: 2 / tau, 1.
    options = SurrogateOptions(form="sapo", sapo_tau_positive=1.0, sapo_tau_negative=2.0)
    loss, gradient, metrics = run((1, 3, 3), (1, 1, -1), options)
    s, t = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-4))
    assert loss == pytest.approx(-2 - 4 * s + 2 * t)
    torch.testing.assert_close(gradient, tensor(-1, -12 * s * (1 - s), 12 * t * (1 - t)))
    assert "clip_ratio/capped_mean" not in metrics and metrics["clip_ratio/region_mean"] == 0


def test_sequence_ratio_is_the_geometric_mean() -> None:
    # Sequence 0: ratios 2, 1/2, 1 -> 1; sequence 1: 1.44, 1 -> 1.2. Its gradient spreads: s / |o| per token, times the
    # number of its tokens because each has the same value and weight 1: 3 (1/3) A and 2 (1.2 / 2) A.
    options = SurrogateOptions(ratio_level="sequence", epsilon_low=0.1, epsilon_high=0.3)
    sequences = torch.tensor([0, 0, 0, 1, 1])
    loss, gradient, metrics = run((2, 0.5, 1, 1.44, 1), (1, 1, 1, -2, -2), options, sequences=sequences)
    assert loss == pytest.approx(-3 + 2 * 2 * 1.2)
    torch.testing.assert_close(gradient, tensor(-1, -1, -1, 2.4, 2.4))
    assert metrics["policy/ratio_max"] == pytest.approx(1.2)
    # Clipped as a whole: with a range up to 1.1 and a positive advantage the second sequence stops.
    options = SurrogateOptions(ratio_level="sequence", epsilon_high=0.1)
    _, gradient, metrics = run((2, 0.5, 1, 1.44, 1), (1, 1, 1, 2, 2), options, sequences=sequences)
    torch.testing.assert_close(gradient, tensor(-1, -1, -1, 0, 0))
    assert metrics["clip_ratio/high_mean"] == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("estimator", "corrected", "direction"),
    [
        ("k1", False, "none"),
        ("k2", False, "reverse"),
        ("k3", False, "forward"),
        ("k1", True, "reverse"),
        ("k3", True, "reverse"),
    ],
)
def test_expected_gradient_of_the_kl_term(estimator: Any, corrected: bool, direction: str) -> None:
    """Over all tokens of a distribution, weighted by their chance: which divergence each estimate descends.

    Corrected, it does so for tokens of another policy too.
    """
    logits = tensor(0.2, -0.5, 1.1, 0.4).requires_grad_()
    reference = tensor(-0.3, 0.6, 0.5, 0.1).log_softmax(0)
    behaviour = tensor(0.9, 0.2, -0.1, 0.3).log_softmax(0) if corrected else logits.detach().log_softmax(0)
    logprobs = logits.log_softmax(0)
    options = SurrogateOptions(
        beta=1.0, kl_estimator=estimator, kl_corrected=corrected, importance_cap=float("inf")
    )  # fmt: skip
    loss = policy_loss(
        logprobs, behaviour, torch.zeros(4, dtype=F64), behaviour.exp(), options, reference_logprobs=reference
    ).loss
    found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    exact = {
        "none": 0 * logprobs.sum(),
        "reverse": (logprobs.exp() * (logprobs - reference)).sum(),
        "forward": (reference.exp() * (reference - logprobs)).sum(),
    }
    torch.testing.assert_close(found, torch.autograd.grad(exact[direction], logits)[0], rtol=1e-10, atol=1e-12)


def test_kl_values_are_unbiased() -> None:
    pi, reference = tensor(0.2, -0.5, 1.1).log_softmax(0), tensor(-0.3, 0.6, 0.5).log_softmax(0)
    exact = float((pi.exp() * (pi - reference)).sum())
    for estimator in ("k1", "k3"):
        assert float((pi.exp() * kl_estimate(pi, reference, estimator)).sum()) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "clipp"}, r"surrogate.form is 'clipp'; expected one of clip, cispo, sapo, .*'clip'"),
        ({"dual_clip": 1.1}, r"dual_clip is 1.1; set it to null or a number above 1 \+ epsilon_high"),
        (
            {"dual_clip": 1.25, "epsilon_high": 0.25},
            r"dual_clip is 1.25; set it to null or a number above 1 \+ epsilon",
        ),
        ({"epsilon_low": 1.01}, r"epsilon_low is 1.01; set it to a number in \[0, 1\]"),
        ({"epsilon_high": -0.1}, r"epsilon_high is -0.1; set it to 0 or more"),
        ({"cispo_cap": 0}, "cispo_cap is 0; set it to a number above 0"),
        ({"sapo_tau_positive": 0}, "sapo_tau_positive is 0; set it to a number above 0"),
        ({"sapo_tau_negative": 0}, "sapo_tau_negative is 0; set it to a number above 0"),
        ({"sapo_tau_negative": -1}, "sapo_tau_negative is -1; set it to a number above 0"),
        ({"importance_cap": 0}, "importance_cap is 0; set it to a number above 0"),
        ({"beta": -0.1}, r"beta is -0.1; set it to 0 \(no reference\) or more"),
        ({"dual_clip": 3.0, "form": "sapo"}, r"dual_clip is 3.0 with form='sapo'.*Set dual_clip to null"),
        ({"clip_center": "behaviour", "importance_level": "sequence"}, "'behaviour' with importance_level='sequence'"),
        ({"clip_center": "behaviour", "importance_mode": "mask"}, "no importance weight.*set clip_center to old"),
        ({"kl_corrected": True}, "kl_corrected is true with beta=0"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        SurrogateOptions(**options)
    assert "\n" not in str(error.value)


def test_the_sequence_ratio_needs_sequences() -> None:
    with pytest.raises(ValueError, match="needs the sequence index"):
        run((1,), (1,), SurrogateOptions(ratio_level="sequence"))


def test_every_value_inside_its_bounds_is_accepted() -> None:
    SurrogateOptions(epsilon_low=0, epsilon_high=0, dual_clip=1.01)
    SurrogateOptions(epsilon_low=1, epsilon_high=5)
    SurrogateOptions(form="cispo", cispo_cap=0.5, importance_cap=0.5)
    SurrogateOptions(form="sapo", sapo_tau_positive=0.5, sapo_tau_negative=0.5, beta=0.001, kl_corrected=True)


def moved(ratio: Tensor, advantages: Tensor) -> MovedTokens:
    """Tokens that had the probability 1/2."""
    half = torch.full_like(ratio, 0.5).log()
    return MovedTokens(half + ratio.log(), half, ratio, advantages, torch.ones_like(ratio))


def test_tokens_on_a_bound_or_without_advantage_do_not_count_as_clipped() -> None:
    ratio = tensor(0.75, 0.5, 1.25, 1.5, 0.5, 1.5)
    advantages = tensor(-1, 0, 1, 0, -1, 1)
    tokens = moved(ratio, advantages)
    low, high = clipped_tokens(tokens, SurrogateOptions(epsilon_low=0.25, epsilon_high=0.25))
    assert low.tolist() == [False] * 4 + [True, False]
    assert high.tolist() == [False] * 5 + [True]
    for form in ("cispo", "sapo"):
        for nowhere in clipped_tokens(tokens, SurrogateOptions(form=form)):
            assert (nowhere.tolist(), nowhere.dtype) == ([False] * 6, torch.bool)


def test_tokens_on_the_second_bound_or_without_advantage_do_not_count_as_capped() -> None:
    ratio, advantages = tensor(3, 4, 4, 4), tensor(-1, 0, 1, -1)
    tokens = moved(ratio, advantages)
    capped = capped_tokens(tokens, SurrogateOptions(dual_clip=3.0))
    assert capped is not None
    assert capped.tolist() == [False, False, False, True]
    capped = capped_tokens(tokens, SurrogateOptions(form="cispo", cispo_cap=3.0))
    assert capped is not None
    assert capped.tolist() == [False, True, True, True]
    assert capped_tokens(tokens, SurrogateOptions()) is None


LN2, LN4 = math.log(2), math.log(4)


def of_sequences(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def test_cispo_with_a_floor() -> None:
    # Weights 0.5, 2 and 3 (capped) of A grad log pi: the log-probs are ln 0.05, ln 1 and ln 2.
    options = SurrogateOptions(form="cispo", cispo_floor=0.5, cispo_cap=3.0)
    loss, gradient, _ = run((0.1, 2, 4), (1, -1, 1), options)
    torch.testing.assert_close(gradient, tensor(-0.5, 2, -3))
    assert loss == pytest.approx(-0.5 * math.log(0.05) - 3 * LN2)


def test_total_variation_bounds_the_change_of_a_probability() -> None:
    # From 1/2 to 0.6, 0.7, 0.3 and 0.1: changes of +0.1, +0.2, -0.2 and -0.4. The bounds are 0.15 and 0.3; what moves
    # against its advantage is not bounded. The ratio 1.4 is weighed as 1.3.
    options = SurrogateOptions(form="dppo_tv", epsilon_low=0.3, epsilon_high=0.15, dppo_cap=1.3)
    _, gradient, metrics = run((1.2, 1.4, 0.6, 0.2, 1.4), (1, 1, -1, -1, -1), options)
    torch.testing.assert_close(gradient, tensor(-1.2, 0, 0.6, 0, 1.3))
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == pytest.approx((0.2, 0.2))
    assert metrics["clip_ratio/capped_mean"] == pytest.approx(0.4)


def test_the_geometric_mean_of_clipped_ratios() -> None:
    # A = 1: log-ratios ln 2 (clipped to 0.4) and -ln 4 (kept: it is the smaller): mean (0.4 - ln 4) / 2. A = -1: ln 2
    # is kept (pessimistic), -ln 4 becomes -0.4: mean (ln 2 - 0.4) / 2. Weights are 1.
    options = SurrogateOptions(form="geo_mean", epsilon_low=0.4, epsilon_high=0.4)
    sequences = of_sequences(0, 0, 1, 1)
    loss, gradient, metrics = run((2, 0.25, 2, 0.25), (1, 1, -1, -1), options, sequences=sequences)
    first, second = math.exp((0.4 - LN4) / 2), math.exp((LN2 - 0.4) / 2)
    assert loss == pytest.approx(2 * (-first + second))
    torch.testing.assert_close(gradient, tensor(0, -first, second, 0))
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == (0.25, 0.25)


def test_without_a_ratio() -> None:
    loss, gradient, _ = run((4, 0.5), (2, -1), SurrogateOptions(form="gpg"))
    torch.testing.assert_close(gradient, tensor(-2, 1))
    assert loss == pytest.approx(-2 * LN2 + 1 * math.log(0.25))


def test_the_smooth_weight_of_a_sequence() -> None:
    # w = 2 x 0.5 x 2 = 2. A >= 0: e^3 2^2 e^-6 = 4 e^-3; A < 0: e^2 2^3 e^-4 = 8 e^-2.
    options = SurrogateOptions(form="vespo")
    sequences = of_sequences(0, 0, 0, 1, 1, 1)
    _, gradient, _ = run((2, 0.5, 2) * 2, (1, 1, 1, -1, -1, -1), options, sequences=sequences)
    torch.testing.assert_close(gradient, tensor(*[-4 * math.exp(-3)] * 3, *[8 * math.exp(-2)] * 3))
    assert run((1, 1), (1, 1), options, sequences=of_sequences(0, 0))[1].tolist() == pytest.approx([-1, -1])


def test_the_importance_of_a_sequence_is_part_of_its_smooth_weight() -> None:
    # pi_old / mu is 2 at both tokens, the first capped at 1.5: w = 1 x 1.5 x 1.5.
    old = tensor(0.5, 0.5).log()
    logprobs = old.clone().requires_grad_()
    options = SurrogateOptions(form="vespo", importance_cap=1.5)
    ones = torch.ones(2, dtype=F64)
    policy_loss(
        logprobs, old - LN2, ones, ones, options, old_logprobs=old, sequences=of_sequences(0, 0)
    ).loss.backward()
    w = 2.25
    torch.testing.assert_close(logprobs.grad, tensor(*[-math.exp(3 - 3 * w) * w**2] * 2))


def test_the_largest_covariances_are_penalised() -> None:
    # Log-probs ln 0.5 + ln(4, 1, 1, 1) have the mean ln 0.5 + ln 4 / 4; A of 3, -1, -1, -1 has the mean 0. The first
    # token has the covariance 9/4 ln 4, the others 1/4 ln 4: a quarter of the tokens is the first.
    options = SurrogateOptions(form="kl_cov", cov_fraction=0.25, kl_cov_coef=0.5)
    loss, gradient, _ = run((4, 1, 1, 1), (3, -1, -1, -1), options)
    assert loss == pytest.approx(-(4 * 3 - 3) + 0.5 * LN4)
    torch.testing.assert_close(gradient, tensor(-12 + 0.5, 1, 1, 1))


def test_covariances_within_their_bounds_are_left_out() -> None:
    # As above; the covariances are 3.12 and 0.35. The first token is beyond the clip range and never a candidate.
    ratios, advantages = (4, 1, 1, 1), (3, -1, -1, -1)
    options = SurrogateOptions(form="clip_cov", cov_low=0.3, cov_high=5.0, cov_fraction=0.5)
    _, gradient, _ = run(ratios, advantages, options)
    torch.testing.assert_close(gradient, tensor(0, 0, 0, 1))  # candidates 1, 2 and 3: evenly spaced, 1 and 2
    options = SurrogateOptions(form="clip_cov", cov_low=1.0, cov_high=5.0, cov_fraction=0.5)
    _, gradient, _ = run(ratios, advantages, options)
    torch.testing.assert_close(gradient, tensor(0, 1, 1, 1))
    wide = SurrogateOptions(form="clip_cov", epsilon_high=5.0, cov_low=1.0, cov_high=5.0, cov_fraction=0.5)
    torch.testing.assert_close(run(ratios, advantages, wide)[1], tensor(0, 1, 1, 1))
    narrow = SurrogateOptions(form="clip_cov", epsilon_high=5.0, cov_low=1.0, cov_high=3.0, cov_fraction=0.5)
    torch.testing.assert_close(run(ratios, advantages, narrow)[1], tensor(-12, 1, 1, 1))


def test_sequences_far_from_their_sampler_are_left_out_where_their_advantage_is_negative() -> None:
    # log(mu / pi): ln 2 on average in both; above 0.5, so that the second sequence is left out and the first kept.
    options = SurrogateOptions(form="gpg", off_policy_mask_threshold=0.5)
    sequences = of_sequences(0, 0, 1, 1)
    _, gradient, _ = run((0.25, 1, 0.25, 1), (1, 1, -1, -1), options, sequences=sequences)
    torch.testing.assert_close(gradient, tensor(-1, -1, 0, 0))
    options = SurrogateOptions(form="gpg", off_policy_mask_threshold=0.7)
    _, gradient, _ = run((0.25, 1, 0.25, 1), (1, 1, -1, -1), options, sequences=sequences)
    torch.testing.assert_close(gradient, tensor(-1, -1, 1, 1))


def test_the_tokens_of_the_highest_entropy_count() -> None:
    options = SurrogateOptions(form="gpg", top_entropy_quantile=0.25)
    _, gradient, _ = run((1,) * 5, (1,) * 5, options, entropy=tensor(0.1, 0.5, 0.2, 0.4, 0.3))
    torch.testing.assert_close(gradient, tensor(0, -1, 0, -1, 0))  # the quantile 0.75 of five is the fourth


def test_forms_that_read_each_tokens_ratio_refuse_that_of_the_sequence() -> None:
    for form in ("clip_cov", "kl_cov", "dppo_tv", "geo_mean", "gpg", "vespo"):
        with pytest.raises(UserError, match="reads each token's own ratio"):
            SurrogateOptions(form=form, ratio_level="sequence")
