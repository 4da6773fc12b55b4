"""Micro-batches and their layout, by hand and through a real causal LM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from app.objective.logprobs import token_logprobs
from app.objective.options import SurrogateOptions
from app.objective.packing import ScoredSequence, collate, pack, plan_microbatches
from app.objective.ratios import token_weights
from app.objective.surrogate import policy_loss


def test_plan_by_hand() -> None:
    # By length: 9 (its own, above 8), then 4, 3 (2 x 4 = 8), then 2, 2, 1 (3 x 2 = 6; a fourth would fit).
    assert plan_microbatches([3, 9, 2, 4, 1, 2], 8) == [[1], [3, 0], [2, 5, 4]]
    assert plan_microbatches([], 8) == []
    # A row takes one token at least, and the budget of one token is enough for one.
    assert plan_microbatches([0, 0, 0], 2) == [[0, 1], [2]]
    assert plan_microbatches([1, 1], 1) == [[0], [1]]
    # Equal ones keep their order, however many there are.
    assert plan_microbatches([1, 2] * 50, 200) == [[*range(1, 100, 2), *range(0, 100, 2)]]
    with pytest.raises(ValueError, match="max_tokens=0"):
        plan_microbatches([1], 0)


def test_plan_covers_everything_within_the_budget_and_with_little_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 512)
    plan = plan_microbatches(lengths, 4096)
    assert sorted(index for part in plan for index in part) == list(range(512))
    cost = [len(part) * lengths[part].max() for part in plan]
    assert max(cost) <= 4096
    assert 1 - lengths.sum() / sum(cost) < 0.05
    # Never more micro-batches than lower bound by tokens plus what rounding to whole rows may cost.
    assert len(plan) <= 1.15 * np.ceil(lengths.sum() / 4096)


def test_collate_by_hand() -> None:
    batch = collate(
        [
            ScoredSequence([5, 6], [7], [-0.5], 1.0, 0.25, old_logprobs=[-0.75]),
            ScoredSequence((1,), np.array([2, 3, 4]), np.array([-1.0, -2.0, -3.0]), -2.0, 0.5, replayed=True),
        ],
        pad_token_id=9,
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 9], [1, 2, 3, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    # Row 0: position 1 predicts 7. Row 1 starts at 4: positions 0, 1, 2 predict 2, 3, 4.
    assert batch.predictors.tolist() == [1, 4, 5, 6]
    assert batch.targets.tolist() == [7, 2, 3, 4]
    assert batch.sequences.tolist() == [0, 1, 1, 1]
    assert batch.behaviour_logprobs.tolist() == [-0.5, -1, -2, -3]
    assert batch.old_logprobs.tolist() == [-0.75, -1, -2, -3]
    assert batch.advantages.tolist() == [1, -2, -2, -2]
    assert batch.weights.tolist() == [0.25, 0.5, 0.5, 0.5]
    assert batch.replayed.tolist() == [False, True, True, True]
    assert batch.padding_fraction == pytest.approx(1 / 8)
    assert (batch.real_tokens, batch.sequence_tokens, batch.layout) == (7, 7, None)
    shorter, longer = ScoredSequence([5], [7], [-0.5], 1.0, 1.0), ScoredSequence([5, 6], [7], [-0.5], 1.0, 1.0)
    assert collate([shorter, longer]).input_ids.tolist() == [[5, 7, 0], [5, 6, 7]]


@pytest.mark.parametrize("lay_out", [collate, pack])
def test_tokens_are_integers_numbers_float32_and_marks_bool(lay_out: Any) -> None:
    sequences = [ScoredSequence([1], [2, 3], [-1.0, -2.0], 1.0, 1.0), ScoredSequence([1, 4], [2], [-1.0], 1.0, 1.0)]
    batch = lay_out(sequences)
    numbers = {"behaviour_logprobs", "old_logprobs", "advantages", "weights"}
    tokens = {"input_ids", "attention_mask", "position_ids", "predictors", "targets", "sequences"}
    assert {getattr(batch, name).dtype for name in numbers} == {torch.float32}
    assert {getattr(batch, name).dtype for name in tokens} == {torch.int64}
    assert batch.replayed.dtype == torch.bool


def test_wrong_input_is_refused() -> None:
    fine = ScoredSequence([1], [1], [-1.0], 1.0, 1.0)
    for lay_out in (collate, pack):
        with pytest.raises(ValueError, match="sequence 0: 0 prompt and 1 completion tokens, expected both above 0"):
            lay_out([ScoredSequence([], [1], [-1.0], 1.0, 1.0)])
        with pytest.raises(ValueError, match="sequence 1: 1 prompt and 0 completion tokens"):
            lay_out([fine, ScoredSequence([1], [], [], 1.0, 1.0)])
        with pytest.raises(ValueError, match="sequence 1: 2 behaviour_logprobs, expected 1, one per generated token"):
            lay_out([fine, ScoredSequence([1], [1], [-1.0, -1.0], 1.0, 1.0)])
        with pytest.raises(ValueError, match="sequence 0: 0 old_logprobs, expected 1"):
            lay_out([ScoredSequence([1], [1], [-1.0], 1.0, 1.0, old_logprobs=[])])
        with pytest.raises(ValueError, match="no sequences"):
            lay_out([])


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def sequences() -> list[ScoredSequence]:
    rng = np.random.default_rng(4)
    lengths = [(int(rng.integers(1, 6)), int(rng.integers(1, 9))) for _ in range(9)]
    weights = token_weights(torch.tensor([t for _, t in lengths]), "sequence").tolist()
    return [
        ScoredSequence(rng.integers(0, 13, p), rng.integers(0, 13, t), -3 * rng.random(t), rng.normal(), weight)
        for (p, t), weight in zip(lengths, weights, strict=True)
    ]


@pytest.mark.parametrize("masked", [True, False])
def test_padding_changes_no_logprob(model: Qwen2ForCausalLM, sequences: list[ScoredSequence], masked: bool) -> None:
    """Each completion token's log-prob equals that of its sequence run alone, with or without the mask."""
    batch = collate(sequences, pad_token_id=12)
    with torch.no_grad():
        mask = batch.attention_mask if masked else None
        hidden = model.model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).last_hidden_state
        actual, _ = token_logprobs(batch.predicting(hidden), model.lm_head.weight, batch.targets)
        expected = []
        for sequence in sequences:
            ids = torch.tensor([*sequence.prompt_ids, *sequence.completion_ids])
            table = model(ids[None]).logits[0].log_softmax(-1)
            start = len(sequence.prompt_ids)
            expected += [table[position - 1, ids[position]] for position in range(start, len(ids))]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_the_same_gradient_for_any_number_of_microbatches(
    model: Qwen2ForCausalLM, sequences: list[ScoredSequence]
) -> None:
    def gradient(parts: list[list[int]]) -> torch.Tensor:
        model.zero_grad()
        for part in parts:
            batch = collate([sequences[index] for index in part])
            hidden = model.model(batch.input_ids, position_ids=batch.position_ids).last_hidden_state
            logprobs, entropy = token_logprobs(batch.predicting(hidden), model.lm_head.weight, batch.targets)
            options = SurrogateOptions(entropy_coef=0.01)
            tensors = (batch.behaviour_logprobs, batch.advantages, batch.weights)
            policy_loss(logprobs, *tensors, options, entropy=entropy).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    whole = gradient([list(range(9))])
    assert whole.norm() > 1e-3
    for count in (2, 3, 7):
        parts = [part.tolist() for part in np.array_split(np.arange(9), count)]
        assert (gradient(parts) - whole).norm() <= 1e-6 * whole.norm()
    by_budget = plan_microbatches([len(sequence) for sequence in sequences], 24)
    assert len(by_budget) > 2
    assert (gradient(by_budget) - whole).norm() <= 1e-6 * whole.norm()
