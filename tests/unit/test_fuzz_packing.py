"""Micro-batches of any lengths hold every sequence once, within the budget; what is packed is what was given."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.objective.packing import ScoredSequence, collate, plan_microbatches
from tests.support.fuzzing import examples


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 100))
def test_plans_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    plan = plan_microbatches(lengths, budget)
    assert sorted(index for part in plan for index in part) == list(range(len(lengths)))
    for part in plan:
        longest = max(lengths[index] for index in part)
        assert len(part) * longest <= budget or len(part) == 1


@st.composite
def sequences(draw: st.DrawFn) -> ScoredSequence:
    prompt = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    completion = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    logprobs = draw(st.lists(st.floats(-20, 0, width=32), min_size=len(completion), max_size=len(completion)))
    return ScoredSequence(
        prompt, completion, logprobs, draw(st.floats(-3, 3, width=32)), 0.5, replayed=draw(st.booleans())
    )


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(sequences(), min_size=1, max_size=6))
def test_every_target_is_predicted_from_the_token_before_it(given_sequences: list[ScoredSequence]) -> None:
    batch = collate(given_sequences, pad_token_id=99)
    rows, width = batch.input_ids.shape
    flat = batch.input_ids.flatten().tolist()
    expected = [token for one in given_sequences for token in one.completion_ids]
    assert batch.targets.tolist() == expected
    assert [flat[place + 1] for place in batch.predictors.tolist()] == expected
    for row, one in enumerate(given_sequences):
        whole = [*one.prompt_ids, *one.completion_ids]
        assert batch.input_ids[row].tolist() == whole + [99] * (width - len(whole))
        assert batch.attention_mask[row].tolist() == [1] * len(whole) + [0] * (width - len(whole))
    assert rows == len(given_sequences)
    np.testing.assert_array_equal(
        batch.behaviour_logprobs.numpy(),
        np.array([value for one in given_sequences for value in one.behaviour_logprobs], dtype=np.float32),
    )
    assert batch.sequences.tolist() == [row for row, one in enumerate(given_sequences) for _ in one.completion_ids]
    assert batch.replayed.tolist() == [one.replayed for one in given_sequences for _ in one.completion_ids]
